"""What a copy of the deciding matrix would get wrong, foretold from how large its error is.

A copy's score is the truth plus an error that is nearly normal, for it is a sum over many columns
(docs/PREDICTION.md has foretold beside measured).  So one histogram of the truth per neuron says,
for every copy at once, how many false alarms and misses each threshold would make; copies need not
be made to be compared.  `ratio` below is the deviation of a copy's error over that of the truth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import erf

import numpy as np

# Thresholds at which misses and false alarms are foretold, in deviations of the copy's error.
STEP = 0.25
GRID = np.arange(-8.0, 2.0, STEP)
# Bins of the truth in its own deviations, finer towards zero: a good copy errs only there.
_SIDE = (0.01, 0.025, 0.05, 0.08, 0.12, 0.17, 0.24, 0.34, 0.47, 0.65, 0.9, 1.25, 1.75, 2.5, 3.5)
EDGES = np.array([*(-e for e in reversed(_SIDE)), 0.0, *_SIDE], np.float32)
_ENDS = np.concatenate([[-5.0], EDGES, [5.0]])
CENTRES = (_ENDS[:-1] + _ENDS[1:]) / 2
N_BINS, N_NEGATIVE = len(CENTRES), len(_SIDE) + 1
# A score is drawn towards the truth's mean: that moves its neuron's thresholds by at most so much.
MOST_SHIFT = 6.0
RATIOS = np.geomspace(0.005, 1.0, 25)  # a bottleneck's neurons are taken together by these
_NORMAL = np.array([0.5 * (1 + erf(z / 2**0.5)) for z in np.arange(-6, 6.0001, 1 / 64)])


@dataclass(eq=False)
class Truth:
    """Per neuron: how often its pre-activation fell into each bin, among `n` tokens, and its mean
    in deviations."""

    n: int
    counts: np.ndarray  # float32 [n_neurons, N_BINS]
    mean: np.ndarray  # float32 [n_neurons]
    deviation: np.ndarray  # float32 [n_neurons]

    @classmethod
    def empty(cls, n_tokens: int, n_neurons: int) -> Truth:
        return cls(n_tokens, np.zeros((n_neurons, N_BINS), np.float32),
                   np.zeros(n_neurons, np.float32), np.ones(n_neurons, np.float32))  # fmt: skip

    def count(self, first: int, decided: np.ndarray) -> None:
        """Pre-activations [n, rows] of neurons first, first + 1, …; overwritten."""
        n = decided.shape[1]
        where = slice(first, first + n)
        deviation = np.maximum(decided.std(axis=0), 1e-30)
        self.deviation[where], self.mean[where] = deviation, decided.mean(axis=0) / deviation
        decided /= deviation
        # A bin's right edge belongs to it: exactly zero is not active.
        bins = np.searchsorted(EDGES, decided.ravel(), side="left").reshape(decided.shape)
        bins += np.arange(n) * N_BINS
        self.counts[where] = np.bincount(bins.ravel(), minlength=n * N_BINS).reshape(n, N_BINS)

    def active(self) -> np.ndarray:
        """float32 [n_neurons]: tokens in which each was active."""
        return self.counts[:, N_NEGATIVE:].sum(axis=1)


def foretell(truth: Truth, ratio: float, where: slice | np.ndarray = slice(None)) -> tuple:
    """(missed, false), float32 [n_neurons, len(GRID)]: active tokens at or under each threshold and
    others above it, for copies with that ratio of the neurons `where`."""
    ratio = min(float(ratio), 0.9999)
    clear = (1 - ratio**2) ** 0.5
    extra = int(MOST_SHIFT / STEP)
    grid = GRID[0] + STEP * np.arange(-extra, len(GRID) + extra)
    # score = truth drawn to its mean / ratio + clear x a normal number
    z = ((1 - ratio**2) / ratio * CENTRES[:, None] - grid[None, :]) / clear
    above = _normal(z).astype(np.float32)
    counts, shift = truth.counts[where], truth.mean[where] * ratio
    places = extra - np.rint(np.clip(shift, -MOST_SHIFT, MOST_SHIFT) / STEP).astype(np.int64)
    places = places[:, None] + np.arange(len(GRID))
    false = counts[:, :N_NEGATIVE] @ above[:N_NEGATIVE]
    found = counts[:, N_NEGATIVE:] @ above[N_NEGATIVE:]
    active = counts[:, N_NEGATIVE:].sum(axis=1, keepdims=True)
    return (np.maximum(active - np.take_along_axis(found, places, axis=1), 0.0),
            np.take_along_axis(false, places, axis=1))  # fmt: skip


def by_ratio(ratios: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    """(ratio, neurons that have about that one), in a few steps."""
    level = np.rint(np.interp(np.log(np.maximum(ratios, 1e-9)), np.log(RATIOS),
                              np.arange(len(RATIOS)))).astype(np.int64)  # fmt: skip
    for one in np.unique(level):
        yield float(RATIOS[one]), np.flatnonzero(level == one)


def sums(truth: Truth, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(misses, false alarms) [len(GRID)] of all neurons together, each with its own ratio."""
    missed, false = np.zeros(len(GRID)), np.zeros(len(GRID))
    for ratio, members in by_ratio(ratios):
        one, other = foretell(truth, ratio, members)
        missed += one.sum(axis=0)
        false += other.sum(axis=0)
    return missed, false


def at_recall(missed: np.ndarray, false: np.ndarray, allowed: float) -> float:
    """False alarms at the threshold that misses `allowed`, between the points of GRID; infinite
    where no threshold misses so few."""
    if missed[0] > allowed:
        return float("inf")
    logs = np.log(np.maximum(false, 1e-9))
    return float(np.exp(np.interp(allowed, missed, logs)))


def _normal(z: np.ndarray) -> np.ndarray:
    """The normal distribution's share below z, to 1e-3."""
    return _NORMAL[np.rint((np.clip(z, -6, 6) + 6) * 64).astype(np.int64)]
