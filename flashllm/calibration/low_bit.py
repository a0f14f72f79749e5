"""Rounding a deciding matrix to a few bits a weight, and how many bits each neuron is worth.

Rounding goes column by column; what one column gets wrong is taken over by the columns that are
still to come, as far as inputs vary together with it (Frantar et al., "GPTQ", arXiv 2210.17323).
That is worth far more here than a bottleneck of the same bytes, because a low-rank copy loses whole
directions and a ReLU's sign is decided in all of them (docs/PREDICTION.md has the numbers).
"""

from __future__ import annotations

import numpy as np

BITS = (1, 2, 3, 4, 5)
# Distance of levels in deviations of a row's weights: where the error was least, measured on six
# layers, flat within 10 %.
STEP = {1: 1.8, 2: 1.0, 3: 0.6, 4: 0.35, 5: 0.19, 6: 0.105}
DAMPING = 0.01  # of the mean variance; 0.001 to 0.05 made no difference
BLOCK = 32  # columns whose corrections wait for one matrix product


class Rounding:
    """Rounds rows for inputs of one covariance; columns in descending order of variance."""

    def __init__(self, covariance: np.ndarray):
        n = len(covariance)
        damped = covariance + np.eye(n) * max(DAMPING * np.trace(covariance) / n, 1e-30)
        self.order = np.argsort(-np.diag(damped), kind="stable")
        ordered = damped[np.ix_(self.order, self.order)]
        upper = np.linalg.cholesky(np.linalg.inv(ordered)).T
        self._upper = np.ascontiguousarray(upper, dtype=np.float32)

    def codes(
        self, rows: np.ndarray, bits: tuple[int, ...] = BITS
    ) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 [len(bits), n, hidden_size] codes, float32 [len(bits), n] steps) of float32 rows:
        a weight is about step / 2 * (2 * code - (2^bits - 1))."""
        n, hidden = rows.shape
        deviation = np.maximum(rows.std(axis=1), 1e-30)
        steps = np.concatenate([STEP[b] * deviation for b in bits]).astype(np.float32)
        top = np.repeat(np.array([2**b - 1 for b in bits], np.float32), n)
        half = top / 2
        left = np.tile(rows[:, self.order].T, (1, len(bits)))  # [hidden, bits x n], to be rounded
        codes = np.empty(left.shape, np.uint8)
        for first in range(0, hidden, BLOCK):
            stop = min(first + BLOCK, hidden)
            errors = np.empty((stop - first, left.shape[1]), np.float32)
            for j in range(first, stop):
                code = np.rint(left[j] / steps + half)
                np.clip(code, 0, top, out=code)
                codes[j] = code
                error = errors[j - first]
                np.subtract(left[j], (code - half) * steps, out=error)
                error /= self._upper[j, j]
                left[j + 1 : stop] -= self._upper[j, j + 1 : stop, None] * error
            left[stop:] -= self._upper[first:stop, stop:].T @ errors
        out = np.empty((len(bits), n, hidden), np.uint8)
        out[:, :, self.order] = codes.T.reshape(len(bits), n, hidden)
        return out, steps.reshape(len(bits), n)


def levels(codes: np.ndarray, bits: int) -> np.ndarray:
    """The odd levels that codes stand for, float32."""
    return 2 * codes.astype(np.float32) - np.float32(2**bits - 1)


# Thresholds at which each neuron's misses and false alarms are counted, in deviations.
GRID = np.arange(-8.0, 2.0, 0.25)


class Tables:
    """Per neuron, choice of bits and threshold of GRID: tokens that were active and not predicted
    (`missed`), and predicted and not active (`false`); choice 0 is no row, which misses all."""

    def __init__(self, n_rows: int, n_choices: int):
        shape = (n_rows, n_choices, len(GRID))
        self.missed, self.false = np.zeros(shape, np.int32), np.zeros(shape, np.int32)

    def count(self, first: int, choice: int, scores: np.ndarray, active: np.ndarray) -> None:
        """Scores and truth [tokens, rows] of rows first, first + 1, …"""
        n, size = scores.shape[1], len(GRID) + 1
        # A score in bin k is above the thresholds 0 .. k - 1.
        bins = np.ceil((scores - GRID[0]) / (GRID[1] - GRID[0])).astype(np.int64)
        np.clip(bins, 0, len(GRID), out=bins)
        place = np.arange(n) * (2 * size) + active * size + bins
        found = np.bincount(place.ravel(), minlength=n * 2 * size).reshape(n, 2, size)
        below = np.cumsum(found, axis=2)[:, :, :-1]  # scores at or under threshold k
        where = slice(first, first + n)
        self.missed[where, choice] = below[:, 1]
        self.false[where, choice] = found[:, 0].sum(axis=1, keepdims=True) - below[:, 0]


def choose_bits(
    tables: Tables, expected: np.ndarray, row_bytes: np.ndarray, *,
    budget: int, recall: float, worth: float,
) -> np.ndarray:  # fmt: skip
    """Which choice (0: no row) is best for each neuron.

    expected   how often a neuron should be active in the tables' tokens, from more text than those
    row_bytes  of each choice; 0 for choice 0
    budget     bytes of all rows together
    worth      false alarms (in the tables' tokens) that a byte of memory is worth anyway

    Minimises false alarms at `recall`, in turns: a threshold gives the price of a miss, prices give
    the choices, these give the next threshold.  A choice with which no threshold reaches the recall
    raises the price instead; what never does is taken only when nothing else fits.
    """
    missed = tables.missed.astype(np.float32)
    missed[:, 0] = expected[:, None]  # rows that the sample has hardly seen keep their chance
    n_rows, rows = len(missed), np.arange(len(missed))
    allowed = (1 - recall) * max(float(expected.sum()), 1e-9)
    affordable = np.flatnonzero(row_bytes * n_rows <= budget)[-1]
    chosen = np.full(n_rows, max(1, affordable))
    best = chosen if affordable else np.zeros(n_rows, np.int64)
    least, least_price = np.inf, 1.0  # a miss is never worth less than a false alarm
    at, price = _threshold(tables, missed, chosen, allowed)
    for _ in range(8):
        price = max(price, least_price)
        waste = tables.false[:, :, at] + price * missed[:, :, at]
        chosen = _cheapest(waste, row_bytes, budget, worth)
        if missed[rows, chosen, 0].sum() > allowed:
            least_price = 4 * price
            best = chosen if np.isinf(least) else best
            continue
        at, price = _threshold(tables, missed, chosen, allowed)
        found = tables.false[rows, chosen, at].sum() + worth * row_bytes[chosen].sum()
        if found < least:
            best, least = chosen, found
    return best


def _threshold(tables, missed, chosen, allowed: float) -> tuple[int, float]:
    """(index of the highest threshold that misses no more than allowed, false alarms that lowering
    it costs per miss that it saves)."""
    rows = np.arange(len(chosen))
    misses = missed[rows, chosen].sum(axis=0)
    false = tables.false[rows, chosen].sum(axis=0)
    at = max(0, int(np.searchsorted(misses, allowed, side="right")) - 1)
    # The slope over a few steps of the grid: single ones are noise.
    low, high = max(0, at - 2), min(len(GRID) - 1, at + 2)
    return at, float(false[low] - false[high]) / max(float(misses[high] - misses[low]), 1.0)


def _cheapest(waste, row_bytes, budget: int, worth: float) -> np.ndarray:
    """Per row the choice of least waste + price of its bytes, at the least price (but `worth`) that
    keeps within the budget."""

    def at_price(price: float) -> np.ndarray:
        return np.argmin(waste + price * row_bytes, axis=1)

    chosen = at_price(worth)
    if row_bytes[chosen].sum() <= budget:
        return chosen
    low, high = max(worth, 1e-9), 1e9
    for _ in range(60):
        middle = (low * high) ** 0.5
        if row_bytes[at_price(middle)].sum() > budget:
            low = middle
        else:
            high = middle
    return at_price(high)
