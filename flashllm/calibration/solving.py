"""One layer's predictor from its statistics and its deciding matrix.

Both kinds are made and the better one is taken: the one that costs less, false alarms counted in
the bytes that they make a token read, memory in the bytes that a cache of that size would have
saved (its bytes times the share of the layer that a token uses).  Thresholds come from tokens that
nothing was fitted to, and what is reported from tokens that come after those in the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import UsageError
from ..kernels.base import KernelSet, low_bit_row_bytes
from ..predictors.fit import aligned
from ..predictors.kinds import FITTED
from ..predictors.low_bit import LowBitPredictor
from ..predictors.low_rank import B_TYPES
from ..predictors.scores import FittedLayer, FittedPredictor, Scratch
from ..quant import WEIGHT_TYPES
from . import low_bit, statistics
from .low_rank import reduced_rank
from .sections import BitRows, low_bit_form, low_bit_section, low_rank_section
from .statistics import LayerStatistics

# Rows of the deciding matrix at once: so many, and with sampled tokens so many products.
ROWS, PRODUCTS = 512, 2**20
LEAST_RANK = 4
# Scores are counted in bins of this width, from -LIMIT to LIMIT, to find thresholds.
BIN, LIMIT = 1 / 128, 32.0
SCORED_TOKENS = 128  # at once
TIMED_TOKENS = 64

KINDS = ("low_bit", "low_rank")
# Of a layer's fair share; sections of all of them wait on disk until the layers are shared out.
SHARES = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
BASE = SHARES.index(1.0)


@dataclass(frozen=True)
class LayerTask:
    """A layer to be fitted: its place, shape, and what a bundle costs to read.

    `rows(first, stop)` gives float32 rows of its deciding matrix, `bias` float32 or None.
    """

    layer: int
    n_bundles: int
    hidden_size: int
    bundle_bytes: int  # all pieces of one neuron, the deciding row included
    rows: Callable[[int, int], np.ndarray]
    bias: np.ndarray | None

    @property
    def streamed_bytes(self) -> int:
        return self.n_bundles * self.bundle_bytes

    @property
    def block_rows(self) -> int:
        n_tokens = statistics.sample_tokens(statistics.FITTED, self.n_bundles)
        # samples keep the truth as bits: blocks begin at whole bytes
        return min(ROWS, PRODUCTS // n_tokens // 8 * 8, -(-self.n_bundles // 8) * 8)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        step = self.block_rows
        for first in range(0, self.n_bundles, step):
            yield first, self.rows(first, min(first + step, self.n_bundles))


@dataclass(frozen=True)
class Aims:
    """What is asked of every layer: `recall` decides the making, `recalls` get thresholds."""

    recall: float
    recalls: tuple[float, ...]
    budgets: tuple[int, ...]  # resident bytes of this layer; the one at BASE is its fair share
    kinds: tuple[str, ...] = KINDS
    unit: int = 1


@dataclass(eq=False)
class Made:
    """A predictor in the making: section, and per row what turns its raw number into a score."""

    layer: FittedLayer
    section: bytes
    scale: np.ndarray  # float32 per row
    bias: np.ndarray
    ids: np.ndarray  # bundle of each row


@dataclass(frozen=True)
class Solved:
    """`layer` and `section` for the file.  `cost`: bytes per token, see the module's text.
    `candidates`: kind -> figures of the best of that kind at the fair share."""

    layer: FittedLayer
    section: bytes
    resident_bytes: int
    microseconds: float
    cost: float
    candidates: dict[str, dict] = field(default_factory=dict)

    def figures(self, aims: Aims) -> dict:
        at = aims.recalls.index(aims.recall)
        return {
            "form": self.layer.form, "resident_bytes": self.resident_bytes,
            "recall": self.layer.recall[at], "precision": self.layer.precision[at],
            "microseconds": self.microseconds,
        }  # fmt: skip


def solve(
    task: LayerTask, stats: LayerStatistics, aims: Aims, kernels: KernelSet
) -> list[Solved]:
    """Predictors of one layer, of the kind that is better, for each of the budgets that it fits."""
    base = aims.budgets[BASE]
    found = {kind: MAKERS[kind](task, stats, aims, [base]) for kind in aims.kinds}
    tried = {kind: [_calibrate(made, task, stats, aims, kernels) for made in many]
             for kind, many in found.items()}  # fmt: skip
    best = {kind: min(many, key=lambda one: one.cost) for kind, many in tried.items() if many}
    if not best:
        raise UsageError(f"layer {task.layer}: no predictor of {task.n_bundles} neurons fits "
                         f"{base} bytes; allow a larger share")
    kind = min(best, key=lambda name: best[name].cost)
    others = [n for i, n in enumerate(aims.budgets) if i != BASE]
    more = [_calibrate(made, task, stats, aims, kernels)
            for made in MAKERS[kind](task, stats, aims, others)]  # fmt: skip
    candidates = {name: one.figures(aims) for name, one in best.items()}
    return [replace(one, candidates=candidates) for one in [*tried[kind], *more]]


def choose(options: list[list[Solved]], budget: int) -> list[Solved]:
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


# ------------------------------------------------------------------------------------------ low bit


def make_low_bit(
    task: LayerTask, stats: LayerStatistics, aims: Aims, budgets: list[int]
) -> list[Made]:
    """Rows of as many bits as each neuron is worth, within each budget that allows any."""
    blank = _blank(task, "low_bit", aims)
    per_row = 4 + LowBitPredictor.id_type(task.n_bundles).itemsize
    empty = LowBitPredictor.bytes_kept(replace(blank, form={"rows": [0] * 6}))
    row_bytes = np.array([0.0] + [
        low_bit_row_bytes(task.hidden_size, bits) + per_row for bits in low_bit.BITS
    ])  # fmt: skip
    rooms = [n - empty for n in budgets if n - empty >= row_bytes[1] * task.n_bundles / 8]
    if not rooms:
        return []
    sample = stats.samples[statistics.FITTED]
    x = sample.x()
    rounding = low_bit.Rounding(stats.covariance())
    n, n_bits = task.n_bundles, len(low_bit.BITS)
    tables = low_bit.Tables(n, n_bits + 1)
    scales, biases = np.empty((n_bits, n)), np.empty((n_bits, n))
    codes = np.empty((n_bits, n, task.hidden_size), np.uint8)
    for first, rows in task.blocks():
        where = slice(first, first + len(rows))
        codes[:, where], steps = rounding.codes(rows)
        truth = x @ rows.T
        active = sample.active(first, first + len(rows))
        offset = _offset(task, where)
        for i, bits in enumerate(low_bit.BITS):
            raw = x @ (low_bit.levels(codes[i, where], bits) * (steps[i, :, None] / 2)).T
            scale, bias, scores = _line(raw, truth, offset)
            scales[i, where], biases[i, where] = scale * steps[i] / 2, bias
            tables.count(first, i + 1, scores, active)
    expected = (stats.counts + 0.5) * (sample.n / max(1, stats.n))
    density = float(stats.counts.sum()) / max(1, stats.n * n)
    made = []
    for room in rooms:
        chosen = low_bit.choose_bits(
            tables, expected, row_bytes, budget=room, recall=aims.recall,
            worth=density * sample.n / task.bundle_bytes,
        )  # fmt: skip
        if stats.counts[chosen == 0].sum() > (1 - aims.recall) * stats.counts.sum():
            continue  # too few rows for the recall, whatever the threshold
        parts = []
        for i, bits in enumerate(low_bit.BITS):
            ids = np.flatnonzero(chosen == i + 1)
            if ids.size:
                parts.append(BitRows(bits, ids, codes[i, ids], scales[i, ids], biases[i, ids]))
        if parts:
            made.append(_of_parts(blank, parts))
    return made


def _of_parts(blank: FittedLayer, parts: list[BitRows]) -> Made:
    return Made(
        replace(blank, form=low_bit_form(parts)), low_bit_section(blank.n_bundles, parts),
        scale=np.concatenate([part.scale for part in parts]).astype(np.float32),
        bias=np.concatenate([part.bias for part in parts]).astype(np.float32),
        ids=np.concatenate([part.ids for part in parts]),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- low rank


def make_low_rank(
    task: LayerTask, stats: LayerStatistics, aims: Aims, budgets: list[int]
) -> list[Made]:
    """The widest bottlenecks within each budget, in int8 and int4."""
    blank = _blank(task, "low_rank", aims)
    widths = {}
    for kind in B_TYPES:
        form = {"rank": 1, "weight_type": kind}
        ranks = {_most_rank(replace(blank, form=form), budget) for budget in budgets}
        widths[kind] = sorted(r for r in ranks if r >= LEAST_RANK)
    if not any(widths.values()):
        return []
    most = max(rank for ranks in widths.values() for rank in ranks)
    a, b = reduced_rank(task.blocks, task.n_bundles, stats.covariance(), most)
    x, kept = stats.samples[statistics.FITTED].x(), WEIGHT_TYPES["int8"]
    shapes = [(kind, min(rank, len(a))) for kind, ranks in widths.items() for rank in ranks]
    shapes = sorted(set(shapes))
    # A as it will be stored; its rows are rounded one by one.
    z = x @ kept.decode(kept.encode(a), task.hidden_size).T
    scales = np.empty((len(shapes), task.n_bundles))
    biases = np.empty_like(scales)
    for first, rows in task.blocks():
        where = slice(first, first + len(rows))
        truth, offset = x @ rows.T, _offset(task, where)
        for i, (_, rank) in enumerate(shapes):
            raw = z[:, :rank] @ b[where, :rank].T
            scales[i, where], biases[i, where], _ = _line(raw, truth, offset)
    made = []
    for i, (kind, rank) in enumerate(shapes):
        scaled = (b[:, :rank] * scales[i, :, None]).astype(np.float32)
        made.append(Made(
            replace(blank, form={"rank": rank, "weight_type": kind}),
            low_rank_section(a[:rank], scaled, biases[i], kind),
            np.ones(task.n_bundles, np.float32), biases[i].astype(np.float32),
            np.arange(task.n_bundles),
        ))  # fmt: skip
    return made


def _most_rank(layer: FittedLayer, budget: int) -> int:
    """The largest rank whose predictor keeps no more than `budget`; 0 if none does."""
    kept = FITTED["low_rank"].bytes_kept
    low, high = 0, layer.hidden_size
    while low < high:
        middle = (low + high + 1) // 2
        if kept(replace(layer, form={**layer.form, "rank": middle})) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


MAKERS = {"low_bit": make_low_bit, "low_rank": make_low_rank}


# ------------------------------------------------------------------------- scores and thresholds


def _blank(task: LayerTask, kind: str, aims: Aims) -> FittedLayer:
    return FittedLayer(
        layer=task.layer, kind=kind, n_bundles=task.n_bundles, hidden_size=task.hidden_size,
        unit=aims.unit, form={},
    )  # fmt: skip


def _offset(task: LayerTask, where: slice) -> np.ndarray | float:
    """What the layer adds to rows @ x: its bias."""
    return 0.0 if task.bias is None else task.bias[where].astype(np.float64)


def _line(
    raw: np.ndarray, truth: np.ndarray, offset: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scale, bias, scores): the least-squares line from a copy's raw numbers [tokens, rows] to the
    truth, in units of the deviation of what is left, so that equal scores are equal odds."""
    raw_mean, mean = raw.mean(axis=0), truth.mean(axis=0)
    raw_centred, left = raw - raw_mean, truth - mean
    spread = np.einsum("tr,tr->r", raw_centred, raw_centred).astype(np.float64)
    shared = np.einsum("tr,tr->r", raw_centred, left).astype(np.float64)
    whole = np.einsum("tr,tr->r", left, left).astype(np.float64) / len(raw)
    # A copy that points the other way says nothing: its sign is kept, as small as it may be.
    slope = np.maximum(shared / np.maximum(spread, 1e-300), 1e-12)
    raw_centred *= slope.astype(np.float32)
    left -= raw_centred
    deviation = np.sqrt(np.einsum("tr,tr->r", left, left).astype(np.float64) / len(raw))
    # What is rounded cannot be known better than a thousandth of itself.
    deviation = np.maximum(deviation, np.maximum(1e-3 * np.sqrt(whole), 1e-12))
    scale = slope / deviation
    bias = (mean - slope * raw_mean + offset) / deviation
    return scale, bias, raw * scale.astype(np.float32) + bias.astype(np.float32)


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
            out[t, made.ids] = self._predictor.raw(token)
        out[:, made.ids] = out[:, made.ids] * made.scale + made.bias
        if unit > 1:
            best = out.reshape(len(x), -1, unit).max(axis=2)
            out = np.repeat(best, unit, axis=1)[:, :n]
        return out


def _histogram(scorer: _Scorer, sample: statistics.Sample) -> np.ndarray:
    """int64 [2, bins]: scores of bundles that were not active, and of those that were."""
    n_bins = int(2 * LIMIT / BIN) + 1
    found, x = np.zeros(2 * n_bins, np.int64), sample.x()
    for first in range(0, sample.n, SCORED_TOKENS):
        scores = scorer.scores(x[first : first + SCORED_TOKENS])
        # Rounded up: a score in bin k is at most the threshold k * BIN - LIMIT.
        places = np.ceil((np.clip(scores, -LIMIT, LIMIT) + LIMIT) / BIN).astype(np.int64)
        places += n_bins * sample.active_at(first, first + SCORED_TOKENS)
        found += np.bincount(places.ravel(), minlength=2 * n_bins)
    return found.reshape(2, n_bins)


def _calibrate(
    made: Made, task: LayerTask, stats: LayerStatistics, aims: Aims, kernels: KernelSet
) -> Solved:
    """Thresholds for the recalls, and what they come to on other tokens."""
    scorer = _Scorer(made, kernels)
    active = _histogram(scorer, stats.samples[statistics.THRESHOLDS])[1]
    below = np.cumsum(active)  # at or under threshold k
    # Bin 0 holds what has no row: it stays missed whatever the threshold.
    bins = [
        max(1, int(np.searchsorted(below, (1 - recall) * below[-1], side="right")) - 1)
        for recall in aims.recalls
    ]
    measured = _histogram(scorer, stats.samples[statistics.MEASURE])
    above = measured[:, ::-1].cumsum(axis=1)[:, ::-1]  # in bin k or higher
    recalls, precisions = [], []
    for k in bins:
        false, found = above[:, k + 1] if k + 1 < above.shape[1] else (0, 0)
        recalls.append(float(found / max(1, above[1, 0])))
        precisions.append(float(found / max(1, found + false)))
    layer = replace(
        made.layer, thresholds=tuple(k * BIN - LIMIT for k in bins), recall=tuple(recalls),
        precision=tuple(precisions),
    )  # fmt: skip
    at = aims.recalls.index(aims.recall)
    timed = stats.samples[statistics.MEASURE].x()[:TIMED_TOKENS]
    kept = FITTED[layer.kind].bytes_kept(layer)
    used = float(stats.counts.sum()) / max(1, stats.n)  # bundles per token
    false = used * recalls[at] * (1 / max(precisions[at], 1e-9) - 1)
    return Solved(
        layer, made.section, kept,
        _microseconds(scorer.predictor(layer.thresholds[at]), timed),
        cost=false * task.bundle_bytes + used / task.n_bundles * kept,
    )  # fmt: skip


def _microseconds(predictor: FittedPredictor, x: np.ndarray) -> float:
    """Median time of `predict`, weights warm in the processor's caches."""
    taken = []
    for token in x:
        started = time.perf_counter_ns()
        predictor.predict(token)
        taken.append(time.perf_counter_ns() - started)
    return float(np.median(taken)) / 1e3 if taken else 0.0
