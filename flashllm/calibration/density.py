"""Calibrating thresholds of magnitude (predictors/magnitude.py): a text through an open model.

Magnitudes are counted in bins of half a per cent, so that memory does not grow with the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from ..api import LLM
from ..errors import UnsupportedError, UsageError
from ..models.base import bundling
from ..predictors.magnitude import Magnitudes
from .recording import observe_text

# Bins are equally wide in the exponent: 2^-24 to 2^8 at 140 to an octave.
LOWEST, HIGHEST, PER_OCTAVE = -24, 8, 140
N_BINS = (HIGHEST - LOWEST) * PER_OCTAVE


def calibrate(
    llm: LLM,
    text: str,
    *,
    densities: Sequence[float],
    n_tokens: int,
    window: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Magnitudes:
    """Thresholds of every layer for `densities` (shares of neurons computed, in (0, 1)), from the
    first `n_tokens` tokens of `text`.

    UnsupportedError for a model that has exact zeros, or whose gate rows lie in its bundles: then
    skipping a neuron would save no reading.
    """
    path, planes = llm.container.path, llm.container.planes
    if not densities or not all(0 < d < 1 for d in densities):
        raise UsageError(f"densities lie between 0 and 1, not {list(densities)}")
    if llm.config.sparse:
        raise UnsupportedError(
            f"{path}: neurons of {llm.config.activation} are exactly zero where they are inactive: "
            "fit predictors of a recall instead"
        )
    layers = [i for i in range(llm.config.n_layers) if f"layers.{i}.deciding" in planes]
    if not layers:
        how = "in the bundles; flashllm relayout --bundle split parts them"
        if bundling(planes) == "rows":
            how = "with an FFN by rows, of which all is read: convert with --bundle split"
        raise UnsupportedError(f"{path}: deciding rows lie {how}")
    densities = tuple(sorted(set(densities)))
    counts = {layer: np.zeros(N_BINS, np.int64) for layer in layers}

    def count(layer: int, _: np.ndarray, decided: np.ndarray) -> None:
        magnitude = np.empty_like(decided)
        llm.kernels.activate(llm.config.activation, decided, None, magnitude)
        np.abs(magnitude, out=magnitude)
        np.maximum(magnitude, np.float32(2.0**LOWEST), out=magnitude)
        bins = ((np.log2(magnitude, out=magnitude) - LOWEST) * PER_OCTAVE).astype(np.int64)
        counts[layer] += np.bincount(np.minimum(bins, N_BINS - 1).ravel(), minlength=N_BINS)

    with llm.lend(sum(c.nbytes for c in counts.values())):
        n_done = observe_text(
            llm, text, count, n_tokens=n_tokens, window=window, label="density",
            progress=progress,
        )  # fmt: skip
    return Magnitudes(
        llm.container.digest, hashlib.sha256(text.encode()).hexdigest(), n_done, densities,
        {layer: tuple(threshold(counts[layer], d) for d in densities) for layer in layers},
    )  # fmt: skip


def threshold(counts: np.ndarray, density: float) -> float:
    """The magnitude that a share of `density` of what was counted reaches, to a bin's width."""
    above = np.cumsum(counts[::-1])[::-1]  # at or above each bin's lower edge
    bin_ = int(np.count_nonzero(above >= density * counts.sum())) - 1
    return float(2.0 ** (LOWEST + max(bin_, 0) / PER_OCTAVE))
