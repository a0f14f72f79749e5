"""What a trace says about a model: activity, reuse between tokens against chance, unions.

*active*: mean share of a layer's bundles that a token uses.  *reuse[k]*: share of a token's active
bundles that were active in at least one of the k tokens before it in its context.  *chance[k]*: the
same if tokens were independent and every bundle kept its own frequency, so that hot bundles count
as chance and only recency shows above it.  *union*: mean share used by UNION consecutive tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import Trace

SPANS = (1, 4, 8)
UNION = 8
_COLUMN_BYTES = 16 * 2**20  # running counts of a slice of the bundles, int32 per token


@dataclass(frozen=True)
class LayerStatistics:
    """See the module's text; `reuse` and `chance` follow SPANS; None where nothing is active."""

    plane: str
    n_bundles: int
    active: float
    reuse: tuple[float | None, ...]
    chance: tuple[float | None, ...]
    union: float | None
    never: float  # share of bundles that no token used


def statistics(trace: Trace) -> list[LayerStatistics]:
    """One row per layer, a slice of its bundles at a time."""
    return [_of_layer(trace, layer) for layer in range(len(trace.layers))]


def _of_layer(trace: Trace, layer: int) -> LayerStatistics:
    info, n_tokens = trace.layers[layer], trace.n_tokens
    bits = trace.bits(layer)
    # tokens of the same context before each one
    context = np.searchsorted(trace.starts, np.arange(n_tokens), side="right") - 1
    age = np.arange(n_tokens) - trace.starts[context]
    counts = np.count_nonzero(bits, axis=0).astype(np.float64)
    total, share = counts.sum(), counts / n_tokens
    reused, n_asked = np.zeros(len(SPANS)), np.zeros(len(SPANS))
    n_union, n_spans = 0, 0
    step = max(1, _COLUMN_BYTES // (4 * n_tokens))
    for first in range(0, info.n_bundles, step):
        part = np.ascontiguousarray(bits[:, first : first + step].T)
        running = np.zeros((len(part), n_tokens + 1), np.int32)
        np.cumsum(part, axis=1, out=running[:, 1:])
        for s, span in enumerate(SPANS):
            at = np.flatnonzero(age >= span)  # with a full span before them
            recent = running[:, at] > running[:, at - span]
            reused[s] += np.count_nonzero(recent & part[:, at])
            n_asked[s] += np.count_nonzero(part[:, at])
        at = np.flatnonzero(age >= UNION - 1) + 1
        n_union += np.count_nonzero(running[:, at] > running[:, at - UNION])
        n_spans = len(at)
    by_chance = [(share * (1 - (1 - share) ** span)).sum() for span in SPANS]
    return LayerStatistics(
        plane=info.plane,
        n_bundles=info.n_bundles,
        active=float(total / n_tokens / info.n_bundles),
        reuse=tuple(float(r / n) if n else None for r, n in zip(reused, n_asked, strict=True)),
        chance=tuple(float(c / share.sum()) if total else None for c in by_chance),
        union=float(n_union / n_spans / info.n_bundles) if n_spans else None,
        never=float(np.mean(counts == 0)),
    )
