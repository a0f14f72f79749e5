"""Rounding a deciding matrix to a few bits a weight, and how many bits each neuron is worth.

Rounding goes column by column; what one column gets wrong is taken over by the columns that are
still to come, as far as inputs vary together with it (Frantar et al., "GPTQ", arXiv 2210.17323).
That is worth far more here than a bottleneck of the same bytes, because a low-rank copy loses whole
directions and a ReLU's sign is decided in all of them (docs/PREDICTION.md has the numbers).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..kernels.base import low_bit_row_bytes
from ..predictors.low_bit import LowBitPredictor
from . import odds
from .factors import InputFactors
from .odds import GRID, Truth, foretell
from .sections import BitRows, low_bit_form, low_bit_section, pack_planes
from .statistics import LayerStatistics
from .tasks import Aims, LayerTask, Made, Offer, line

BITS = (1, 2, 3, 4, 5)
# Distance of levels in deviations of a row's weights: where the error was least, measured on six
# layers, flat within 10 %.
STEPS = np.array([1.0, 1.8, 1.0, 0.6, 0.35, 0.19], np.float32)  # by the number of bits
TRIED_ROWS = 160
BLOCK = 32  # columns whose corrections wait for one matrix product


def rounded(
    factors: InputFactors, rows: np.ndarray, bits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 codes [n, hidden_size], float32 steps [n]) of float32 rows, each in its own number of
    `bits`: a weight is about step / 2 * (2 * code - (2^bits - 1))."""
    n, hidden = rows.shape
    steps = STEPS[bits] * np.maximum(rows.std(axis=1), 1e-30)
    top = (2.0**bits - 1).astype(np.float32)
    half, inverse = top / 2, factors.inverse
    left = np.ascontiguousarray(rows[:, factors.order].T)  # [hidden, n], still to be rounded
    codes = np.empty(left.shape, np.uint8)
    for first in range(0, hidden, BLOCK):
        stop = min(first + BLOCK, hidden)
        errors = np.empty((stop - first, n), np.float32)
        for j in range(first, stop):
            code = np.rint(left[j] / steps + half)
            np.clip(code, 0, top, out=code)
            codes[j] = code
            error = errors[j - first]
            np.subtract(left[j], (code - half) * steps, out=error)
            error /= inverse[j, j]
            left[j + 1 : stop] -= inverse[j, j + 1 : stop, None] * error
        left[stop:] -= inverse[first:stop, stop:].T @ errors
    out = np.empty((n, hidden), np.uint8)
    out[:, factors.order] = codes.T
    return out, steps


def levels(codes: np.ndarray, bits: int | np.ndarray) -> np.ndarray:
    """The odd levels that codes [n, hidden_size] stand for, float32; bits of all or of each row."""
    top = (2.0 ** np.asarray(bits) - 1).astype(np.float32)
    return 2 * codes.astype(np.float32) - top.reshape(-1, 1)


class Tables:
    """Per neuron, choice of bits and threshold of GRID: tokens that were active and not predicted
    (`missed`), and predicted and not active (`false`); choice 0 is no row, which misses all."""

    def __init__(self, truth: Truth, ratios: list[float]):
        shape = (len(truth.mean), len(ratios) + 1, len(GRID))
        self.missed, self.false = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for choice, ratio in enumerate(ratios, start=1):
            self.missed[:, choice], self.false[:, choice] = foretell(truth, ratio)

    @staticmethod
    def n_bytes(n_rows: int, n_choices: int) -> int:
        """Of these and of what is made of them in passing."""
        return n_rows * len(GRID) * (8 * n_choices + 4 * n_choices + 6 * 8)


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
    missed = tables.missed
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


def tried(
    task: LayerTask, stats: LayerStatistics, factors: InputFactors, truth: Truth
) -> list[float]:
    """For each number of bits the ratio of the error that rounding leaves, tried on some rows from
    everywhere in the layer."""
    some = np.unique(np.linspace(0, task.n_bundles - 1, TRIED_ROWS).astype(np.int64))
    rows = np.concatenate([task.rows(i, i + 1) for i in some])
    x, ratios = stats.inputs(), []
    for bits in BITS:
        codes, _ = rounded(factors, rows, np.full(len(rows), bits))
        (_, left), _ = line(x @ levels(codes, bits).T, x @ rows.T, 0.0)
        ratios.append(float(np.sqrt(np.mean(np.square(left / truth.deviation[some])))))
    return ratios


def offers(
    task: LayerTask, stats: LayerStatistics, aims: Aims, factors: InputFactors, truth: Truth,
    expected: np.ndarray,
) -> Iterator[Offer]:  # fmt: skip
    """Within each budget, how many bits each neuron should have."""
    allowed = (1 - aims.recall) * float(expected.sum())
    ratios = tried(task, stats, factors, truth)
    per_row = 4 + LowBitPredictor.id_type(task.n_bundles).itemsize
    empty = LowBitPredictor.bytes_kept(
        replace(task.blank("low_bit", aims.unit), form={"rows": [0] * 6})
    )
    row_bytes = np.array([0.0] + [
        low_bit_row_bytes(task.hidden_size, bits) + per_row for bits in BITS
    ])  # fmt: skip
    worth = stats.used() / task.n_bundles * truth.n / task.bundle_bytes
    tables, rows = Tables(truth, ratios), np.arange(task.n_bundles)
    for budget in aims.budgets:
        room = budget - empty
        if room < row_bytes[1]:
            continue
        chosen = choose_bits(
            tables, expected, row_bytes, budget=room, recall=aims.recall, worth=worth
        )
        missed = tables.missed[rows, chosen].sum(axis=0)
        false = odds.at_recall(missed, tables.false[rows, chosen].sum(axis=0), allowed)
        # What has no row is missed whatever the threshold.
        if chosen.any() and np.isfinite(false) and expected[chosen == 0].sum() <= allowed:
            n_bytes = empty + int(row_bytes[chosen].sum())
            yield Offer(budget, n_bytes, false, chosen.astype(np.uint8))


def build(
    task: LayerTask, stats: LayerStatistics, aims: Aims, factors: InputFactors, bits: np.ndarray
) -> Made:
    x = stats.inputs()
    counts = np.bincount(bits, minlength=len(BITS) + 1)
    packed = {b: np.empty((counts[b], low_bit_row_bytes(task.hidden_size, b)), np.uint8)
              for b in BITS}  # fmt: skip
    done = dict.fromkeys(BITS, 0)
    scales, biases = np.empty(task.n_bundles, np.float32), np.empty(task.n_bundles, np.float32)
    for first, block in task.blocks():
        ids = first + np.flatnonzero(bits[first : first + len(block)])
        if not ids.size:
            continue
        rows, of = block[ids - first], bits[ids]
        codes, _ = rounded(factors, rows, of)
        (scales[ids], _), biases[ids] = line(
            x @ levels(codes, of).T, x @ rows.T, task.offset(ids)
        )
        for b in np.unique(of):
            found = pack_planes(codes[of == b], int(b))
            packed[b][done[b] : done[b] + len(found)] = found
            done[b] += len(found)
    parts = []
    for b in BITS:
        ids = np.flatnonzero(bits == b)
        if ids.size:
            parts.append(BitRows(b, ids, packed.pop(b), scales[ids], biases[ids]))
    order = np.concatenate([part.ids for part in parts])
    blank = replace(task.blank("low_bit", aims.unit), form=low_bit_form(parts))
    return Made(blank, low_bit_section(task.n_bundles, parts), scales[order], biases[order], order)
