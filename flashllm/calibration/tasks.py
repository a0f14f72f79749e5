"""What one layer's predictor is made from, and what comes of it on the way: the words that the two
kinds, the sharing out and the measuring have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..predictors.scores import FittedLayer
from . import statistics

ROWS, BLOCK_BYTES = 512, 12 * 2**20  # of the deciding matrix at once, with all that is made of them


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
        n_tokens = statistics.decided_tokens(self.n_bundles)
        most = BLOCK_BYTES // (20 * n_tokens + 20 * self.hidden_size)
        return min(ROWS, max(8, most // 8 * 8), self.n_bundles)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        step = self.block_rows
        for first in range(0, self.n_bundles, step):
            yield first, self.rows(first, min(first + step, self.n_bundles))

    def blank(self, kind: str, unit: int) -> FittedLayer:
        """How a predictor's description begins."""
        return FittedLayer(
            layer=self.layer, kind=kind, n_bundles=self.n_bundles, hidden_size=self.hidden_size,
            unit=unit, form={},
        )  # fmt: skip

    def offset(self, where: slice | np.ndarray) -> np.ndarray | float:
        """What the layer adds to rows @ x: its bias."""
        return 0.0 if self.bias is None else self.bias[where].astype(np.float64)


@dataclass(frozen=True)
class Aims:
    """What is asked of a layer: `recall` decides the making, `recalls` get thresholds."""

    recall: float
    recalls: tuple[float, ...]
    budgets: tuple[int, ...]  # resident bytes that options may keep; `fair` is its share
    fair: int
    kinds: tuple[str, ...]
    unit: int = 1


@dataclass(frozen=True, eq=False)
class Offer:
    """What a kind would make within `budget`: `false_alarms` are foretold, of all tokens of the
    sample fitted to; `recipe` is for its `build`."""

    budget: int
    resident_bytes: int
    false_alarms: float
    recipe: np.ndarray | tuple[int, str]


@dataclass(frozen=True, eq=False)
class Option:
    """A predictor that could be made.  `cost`: bytes per token (solving.py).  `recipe`:
    bits of each neuron, or (rank, weight type)."""

    kind: str
    budget: int
    resident_bytes: int
    cost: float
    precision: float  # foretold, as the cost is
    recipe: np.ndarray | tuple[int, str]

    def figures(self) -> dict:
        return {"resident_bytes": self.resident_bytes, "foretold_precision": self.precision}


@dataclass(eq=False)
class Made:
    """A predictor in the making: section, and per row what turns its raw number into a score."""

    layer: FittedLayer
    section: bytes
    scale: np.ndarray  # float32 per row
    bias: np.ndarray
    ids: np.ndarray  # bundle of each row


def line(
    raw: np.ndarray, truth: np.ndarray, added: np.ndarray | float
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """((scale, deviation), bias), all float64 [rows]: the least-squares line from a copy's raw
    numbers [tokens, rows] to the truth, in units of the deviation of what is left, so that equal
    scores are equal odds.  Overwrites both."""
    raw_mean, mean = raw.mean(axis=0, dtype=np.float64), truth.mean(axis=0, dtype=np.float64)
    raw -= raw_mean.astype(np.float32)
    truth -= mean.astype(np.float32)
    spread = np.einsum("tr,tr->r", raw, raw).astype(np.float64)
    shared = np.einsum("tr,tr->r", raw, truth).astype(np.float64)
    whole = np.einsum("tr,tr->r", truth, truth).astype(np.float64) / len(raw)
    # A copy that points the other way says nothing: its sign is kept, as small as it may be.
    slope = np.maximum(shared / np.maximum(spread, 1e-300), 1e-12)
    raw *= slope.astype(np.float32)
    truth -= raw
    deviation = np.sqrt(np.einsum("tr,tr->r", truth, truth).astype(np.float64) / len(raw))
    # What is rounded cannot be known better than a thousandth of itself.
    deviation = np.maximum(deviation, np.maximum(1e-3 * np.sqrt(whole), 1e-12))
    bias = (mean - slope * raw_mean + added) / deviation
    return (slope / deviation, deviation), bias
