"""The closed form of a low-rank predictor: reduced-rank regression of what a layer decides on its
input.

Of all B A of rank r, the one that is nearest to W in what it does to inputs with covariance
C = U U' minimises ||D (W - B A) U||: truncate the SVD of D W U and multiply by the inverse of U
(Izenman, 1975).  D weighs each neuron by the inverse of its own deviation, so that a quiet one
counts as much as a loud one.  The SVD comes from the Gram matrix [hidden, hidden], W being read by
blocks of rows; of its directions only the first ones are sought.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from ..predictors.low_rank import B_TYPES, LowRankPredictor
from ..predictors.scores import FittedLayer
from ..quant import WEIGHT_TYPES
from . import odds
from .factors import InputFactors
from .odds import Truth
from .sections import low_rank_section
from .statistics import LayerStatistics
from .tasks import Aims, LayerTask, Made, Offer, line

LEAST_RANK = 4

# Up to this many columns all directions are sought at once: that takes ten matrices of the size.
WHOLE = 512
OVERSAMPLE, ROUNDS = 16, 6  # of the search for the first directions: more rounds changed nothing
# What rounding the stored factor B adds to a neuron's error, as a share of its variance: measured.
ROUNDING = {"int8": 5e-5, "int4": 7e-3}

Blocks = Callable[[], Iterator[tuple[int, np.ndarray]]]  # (first row, float32 rows) of W, afresh


def directions(
    blocks: Blocks, n_rows: int, factors: InputFactors, rank: int, *, weighted: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [hidden_size, r], r <= rank: the first right singular vectors of D W U; float32
    [n_rows]: the variance of each row of W U)."""
    root, whole = factors.root, np.empty(n_rows, np.float32)
    gram = np.zeros(root.shape, np.float32)
    for first, rows in blocks():
        seen = factors.ordered(rows) @ root
        norms = np.maximum(np.einsum("rc,rc->r", seen, seen), 1e-30)
        whole[first : first + len(rows)] = norms
        if weighted:
            seen /= np.sqrt(norms)[:, None]
        gram += seen.T @ seen
    return _leading(gram, min(rank, len(gram))), whole


def search_bytes(hidden_size: int, rank: int) -> int:
    """What `directions` holds at once beside the factors and a block."""
    if hidden_size <= WHOLE:
        return 44 * hidden_size**2
    width = min(hidden_size, rank + OVERSAMPLE)
    return 8 * hidden_size**2 + 32 * hidden_size * width + 32 * width**2


def _leading(gram: np.ndarray, count: int) -> np.ndarray:
    """The eigenvectors of the `count` largest eigenvalues, the largest first: by iterating a
    subspace, which costs as many columns as are sought."""
    width = min(count + OVERSAMPLE, len(gram))
    if len(gram) <= WHOLE:
        return np.linalg.eigh(gram)[1][:, ::-1][:, :count].astype(np.float32)
    found = np.random.default_rng(0).standard_normal((len(gram), width)).astype(np.float32)
    for _ in range(ROUNDS):
        found = _orthogonal(gram @ found)
    inside = found.T @ (gram @ found)
    _, turn = np.linalg.eigh((inside + inside.T) / 2)
    return (found @ turn[:, ::-1][:, :count]).astype(np.float32)


def _orthogonal(columns: np.ndarray) -> np.ndarray:
    """float32 columns that span the same, each orthogonal to the others: by the eigenvalues of
    their products, in float64, which are few.  A QR of columns as long as these took ten times the
    rest of a round."""
    wide = columns.astype(np.float64)
    wide /= np.maximum(np.sqrt(np.einsum("ij,ij->j", wide, wide)), 1e-300)
    values, turn = np.linalg.eigh(wide.T @ wide)
    return (wide @ (turn / np.sqrt(np.maximum(values, 1e-13 * values[-1])))).astype(np.float32)


def left_over(
    blocks: Blocks, whole: np.ndarray, factors: InputFactors, found: np.ndarray, ranks: list[int]
) -> np.ndarray:
    """float32 [len(ranks), n_rows]: of each neuron's variance `whole` the share that a bottleneck
    of each rank misses."""
    out, through = np.empty((len(ranks), len(whole)), np.float32), factors.root @ found
    for first, rows in blocks():
        kept = factors.ordered(rows) @ through
        kept = np.cumsum(np.square(kept, out=kept), axis=1)
        where = slice(first, first + len(rows))
        for i, rank in enumerate(ranks):
            out[i, where] = 1 - kept[:, rank - 1] / whole[where]
    return np.clip(out, 0.0, 1.0, out=out)


def bottleneck(
    blocks: Blocks, n_rows: int, factors: InputFactors, found: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float32 A [r, hidden_size] and B [n_rows, r]: any leading part of both is the best of its
    rank."""
    a = np.empty((found.shape[1], len(found)), np.float32)
    a[:, factors.order] = found.T @ factors.inverse
    b, through = np.empty((n_rows, len(a)), np.float32), factors.root @ found
    for first, rows in blocks():
        b[first : first + len(rows)] = factors.ordered(rows) @ through
    return a, b


def most_rank(layer: FittedLayer, budget: int) -> int:
    """The largest rank whose predictor keeps no more than `budget`; 0 if none does."""
    kept = LowRankPredictor.bytes_kept
    low, high = 0, layer.hidden_size
    while low < high:
        middle = (low + high + 1) // 2
        if kept(replace(layer, form={**layer.form, "rank": middle})) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def largest_rank(task: LayerTask, aims: Aims) -> int:
    """Of the bottlenecks that `survey` considers."""
    blank = task.blank("low_rank", aims.unit)
    return max(most_rank(replace(blank, form={"rank": 1, "weight_type": kind}), aims.budgets[-1])
               for kind in B_TYPES)  # fmt: skip


def offers(
    task: LayerTask, stats: LayerStatistics, aims: Aims, factors: InputFactors, truth: Truth,
    expected: np.ndarray,
) -> Iterator[Offer]:  # fmt: skip
    """Within each budget the widest bottlenecks, in int8 and int4."""
    allowed = (1 - aims.recall) * float(expected.sum())
    blank, shapes = task.blank("low_rank", aims.unit), []
    for kind in B_TYPES:
        form = {"rank": 1, "weight_type": kind}
        for budget in aims.budgets:
            rank = most_rank(replace(blank, form=form), budget)
            if rank >= LEAST_RANK:
                shapes.append((budget, rank, kind))
    if not shapes:
        return
    ranks = sorted({rank for _, rank, _ in shapes})
    found, whole = directions(task.blocks, task.n_bundles, factors, ranks[-1])
    stats.keep(found)
    left = left_over(task.blocks, whole, factors, found, ranks)
    seen = {}
    for budget, rank, kind in shapes:
        if (rank, kind) not in seen:
            share = np.minimum(left[ranks.index(rank)] + ROUNDING[kind], 1.0)
            missed, false = odds.sums(truth, np.sqrt(share))
            seen[rank, kind] = odds.at_recall(missed, false, allowed)
        form = {"rank": rank, "weight_type": kind}
        n_bytes = LowRankPredictor.bytes_kept(replace(blank, form=form))
        # Predicting everything is always possible.
        false = min(seen[rank, kind], truth.n * task.n_bundles - float(expected.sum()))
        yield Offer(budget, n_bytes, false, (rank, kind))


def build(
    task: LayerTask, stats: LayerStatistics, aims: Aims, factors: InputFactors,
    recipe: tuple[int, str],
) -> Made:  # fmt: skip
    rank, weight_type = recipe
    found = np.ascontiguousarray(stats.kept()[:, :rank])  # what `offers` found
    a, b = bottleneck(task.blocks, task.n_bundles, factors, found)
    x, kept = stats.inputs(), WEIGHT_TYPES["int8"]
    z = x @ kept.decode(kept.encode(a), task.hidden_size).T  # A as it will be stored
    biases = np.empty(task.n_bundles, np.float32)
    for first, rows in task.blocks():
        where = slice(first, first + len(rows))
        (scale, _), biases[where] = line(z @ b[where].T, x @ rows.T, task.offset(where))
        b[where] *= scale[:, None]
    form = {"rank": rank, "weight_type": weight_type}
    return Made(
        replace(task.blank("low_rank", aims.unit), form=form),
        low_rank_section(a, b, biases, weight_type),
        np.ones(task.n_bundles, np.float32), biases, np.arange(task.n_bundles),
    )  # fmt: skip
