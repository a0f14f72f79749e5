"""What a predictor truly does: thresholds for the recalls from tokens that nothing was fitted to,
and recall, precision and time on tokens that come after those in the text.

Scores are those that the predictor itself will compute, with its own kernels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np

from ..kernels.base import KernelSet
from ..predictors.fit import aligned
from ..predictors.kinds import FITTED
from ..predictors.scores import FittedLayer, FittedPredictor, Scratch
from . import statistics
from .statistics import LayerStatistics
from .tasks import Aims, Made

# Scores are counted in bins of this width, from -LIMIT to LIMIT, to find thresholds.
BIN, LIMIT = 1 / 128, 32.0
N_BINS = int(2 * LIMIT / BIN) + 1
SCORED = 2**18  # at once
TIMED_TOKENS = 64


@dataclass(frozen=True)
class Solved:
    """`layer` and `section` for the file.  `candidates`: kind -> what was foretold of the best of
    that kind at the fair share of the memory."""

    layer: FittedLayer
    section: bytes
    resident_bytes: int
    microseconds: float
    candidates: dict[str, dict] = field(default_factory=dict)


def measuring_bytes(n_bundles: int, hidden_size: int) -> int:
    """What `measure` holds beside the predictor: a sample, a block of scores and of their bins."""
    sample = 6 * max(statistics.SAMPLES.values()) * hidden_size
    return sample + 40 * max(SCORED, n_bundles) + Scratch.bytes_for(n_bundles, hidden_size)


def measure(
    made: Made, stats: LayerStatistics, aims: Aims, kernels: KernelSet, candidates: dict[str, dict]
) -> Solved:
    scorer = _Scorer(made, kernels)
    _, active = _histogram(scorer, stats.samples[statistics.THRESHOLDS])
    below = np.cumsum(active)  # at or under threshold k
    # Bin 0 holds what has no row: it stays missed whatever the threshold.
    bins = [
        max(1, int(np.searchsorted(below, (1 - recall) * below[-1], side="right")) - 1)
        for recall in aims.recalls
    ]
    sample = stats.samples[statistics.MEASURE]
    above = _histogram(scorer, sample)[:, ::-1].cumsum(axis=1)[:, ::-1]  # in bin k or higher
    recalls, precisions = [], []
    for k in bins:
        false, found = above[:, k + 1] if k + 1 < N_BINS else (0, 0)
        recalls.append(float(found / max(1, above[1, 0])))
        precisions.append(float(found / max(1, found + false)))
    layer = replace(
        made.layer, thresholds=tuple(k * BIN - LIMIT for k in bins), recall=tuple(recalls),
        precision=tuple(precisions),
    )  # fmt: skip
    at = aims.recalls.index(aims.recall)
    taken = _microseconds(scorer.predictor(layer.thresholds[at]), sample.x()[:TIMED_TOKENS])
    kept = FITTED[layer.kind].bytes_kept(layer)
    return Solved(layer, made.section, kept, taken, candidates)


class _Scorer:
    """Scores of all bundles as the predictor itself will compute them."""

    def __init__(self, made: Made, kernels: KernelSet):
        self.made, self._kernels = made, kernels
        kind = FITTED[made.layer.kind]
        raw = np.frombuffer(made.section, np.uint8)
        n_weights = kind.weight_bytes(made.layer)
        self._weights = aligned(n_weights)
        self._weights[:] = raw[:n_weights]
        self._rest = raw[n_weights : n_weights + kind.rest_bytes(made.layer)].copy()
        self._scratch = Scratch(kernels, [made.layer])
        self._predictor = self.predictor(0.0)

    def predictor(self, threshold: float) -> FittedPredictor:
        return FITTED[self.made.layer.kind](
            "a fit in the making", self.made.layer, self._weights, self._rest, threshold,
            self._kernels, self._scratch,
        )  # fmt: skip

    def scores(self, x: np.ndarray) -> np.ndarray:
        """float32 [tokens, n_bundles]: that of the best in its unit; -inf where nothing ever
        predicts."""
        made, unit, n = self.made, self.made.layer.unit, self.made.layer.n_bundles
        out = np.full((len(x), -(-n // unit) * unit), -np.inf, np.float32)
        for t, token in enumerate(x):
            self._predictor.score(token)
            out[t, made.ids] = self._predictor.scores[0] * made.scale + made.bias
        if unit > 1:
            best = out.reshape(len(x), -1, unit).max(axis=2)
            out = np.repeat(best, unit, axis=1)[:, :n]
        return out


def _histogram(scorer: _Scorer, sample: statistics.Sample) -> np.ndarray:
    """int64 [2, N_BINS]: scores of bundles that were not active, and of those that were."""
    found, x = np.zeros(2 * N_BINS, np.int64), sample.x()
    step = max(1, SCORED // sample.n_bundles)
    for first in range(0, sample.n, step):
        scores = scorer.scores(x[first : first + step])
        np.clip(scores, -LIMIT, LIMIT, out=scores)
        scores += np.float32(LIMIT)
        scores *= np.float32(1 / BIN)
        # Rounded up: a score in bin k is at most the threshold k * BIN - LIMIT.
        places = np.ceil(scores, out=scores).astype(np.int64)
        places += np.int64(N_BINS) * sample.active(first, first + step)
        found += np.bincount(places.ravel(), minlength=2 * N_BINS)
    return found.reshape(2, N_BINS)


def _microseconds(predictor: FittedPredictor, x: np.ndarray) -> float:
    """Median time of `predict`, weights warm in the processor's caches."""
    taken = []
    for token in x:
        started = time.perf_counter_ns()
        predictor.predict(token)
        taken.append(time.perf_counter_ns() - started)
    return float(np.median(taken)) / 1e3 if taken else 0.0
