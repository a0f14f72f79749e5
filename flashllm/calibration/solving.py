"""One layer's predictor from its statistics and its deciding matrix, in two steps.

`survey` foretells what predictors of both kinds and several sizes would cost, without making any:
false alarms in the bytes that they make a token read, memory in the bytes that a cache of that size
would have saved (its bytes times the share of the layer that a token uses).  When all layers have
been surveyed `choose` shares the memory out, and `build` makes what was chosen.  What is reported
is measured (measuring.py), never foretold.
"""

from __future__ import annotations

import numpy as np

from ..errors import UsageError
from . import low_bit, low_rank, odds, statistics
from .factors import InputFactors
from .odds import Truth
from .statistics import LayerStatistics
from .tasks import BLOCK_BYTES, Aims, LayerTask, Made, Option

# Buffers of the linear algebra and what the allocator keeps between arrays: measured, 4 to 12 MiB.
LIBRARY_BYTES = 10 * 2**20

KINDS = {"low_bit": low_bit, "low_rank": low_rank}


def solving_bytes(task: LayerTask, most_rank: int) -> int:
    """The most that surveying or building one layer holds: factors of the inputs' covariance, the
    sample fitted to, what is foretold of every neuron, a block of rows."""
    hidden, n = task.hidden_size, task.n_bundles
    sample = 4 * statistics.decided_tokens(n) * hidden
    foretold = low_bit.Tables.n_bytes(n, len(low_bit.BITS) + 1)
    truth = 12 * n * odds.N_BINS
    search = low_rank.search_bytes(hidden, most_rank)
    factors = 4 * hidden**2 + InputFactors.n_bytes(hidden)  # the blocks of inputs are gone
    later = 8 * hidden**2 + truth + BLOCK_BYTES + max(sample, foretold, search)
    built = 8 * hidden**2 + max(search, sample + 8 * n * most_rank) + BLOCK_BYTES
    return max(factors, later, built) + LIBRARY_BYTES


def survey(task: LayerTask, stats: LayerStatistics, aims: Aims) -> list[Option]:
    """What could be made of one layer within each of the budgets; UsageError if nothing."""
    factors = InputFactors(stats.covariance())
    truth = _truth(task, stats)
    # Neurons that the sample has hardly seen keep the chance that more text gave them.
    expected = (stats.counts + 0.5) * (truth.n / max(1, stats.n))
    used, found = stats.used(), []
    for kind in aims.kinds:
        for offer in KINDS[kind].offers(task, stats, aims, factors, truth, expected):
            false = offer.false_alarms / truth.n
            cost = false * task.bundle_bytes + used / task.n_bundles * offer.resident_bytes
            kept = aims.recall * used
            found.append(Option(
                kind, offer.budget, offer.resident_bytes, cost, kept / max(kept + false, 1e-9),
                offer.recipe,
            ))  # fmt: skip
    if not found:
        raise UsageError(f"layer {task.layer}: no predictor of {task.n_bundles} neurons reaches "
                         f"recall {aims.recall} within {aims.budgets[-1]} bytes; allow a larger "
                         "share")  # fmt: skip
    return found


def choose(options: list[list[Option]], budget: int) -> list[Option]:
    """One of each layer's options, so that all fit `budget` together and cost least; UsageError
    when the smallest do not fit."""
    costs = [np.array([one.cost for one in many]) for many in options]
    sizes = [np.array([one.resident_bytes for one in many]) for many in options]
    if sum(int(many.min()) for many in sizes) > budget:
        raise UsageError(f"the smallest predictors take {sum(int(m.min()) for m in sizes)} bytes, "
                         f"{budget} are allowed; allow a larger share")  # fmt: skip

    def at_price(price: float) -> list[int]:
        return [int(np.argmin(c + price * n)) for c, n in zip(costs, sizes, strict=True)]

    def total(picked: list[int]) -> int:
        return sum(int(n[i]) for n, i in zip(sizes, picked, strict=True))

    low, high = 0.0, 1e12
    picked = at_price(low)
    if total(picked) > budget:
        for _ in range(100):
            middle = (low + high) / 2 if low else high / 1e3
            if total(at_price(middle)) > budget:
                low = middle
            elif not low and middle > 1e-12:
                high = middle
            else:
                high = middle
        picked = at_price(high)
    return [many[i] for many, i in zip(options, picked, strict=True)]


def build(task: LayerTask, stats: LayerStatistics, aims: Aims, option: Option) -> Made:
    """The predictor of an option."""
    factors = InputFactors(stats.covariance())
    return KINDS[option.kind].build(task, stats, aims, factors, option.recipe)


def _truth(task: LayerTask, stats: LayerStatistics) -> Truth:
    x = stats.inputs()
    truth = Truth.empty(len(x), task.n_bundles)
    for first, rows in task.blocks():
        where = slice(first, first + len(rows))
        truth.count(first, x @ rows.T + np.float32(task.offset(where)))
    return truth
