"""What fitted predictors share: a section of a .fit file, scratch, and scores against a threshold.

A score compares with one threshold per layer, so what is kept per row is not scale and bias but the
value above which the kernel's raw number means yes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import FormatError
from ..kernels.base import Activations, KernelSet, PieceView
from .base import Predictor

# A predictor's Python objects, measured; the rest of it is arrays.
OBJECT_BYTES = 4096


@dataclass(frozen=True)
class FittedLayer:
    """One layer as a .fit file's manifest describes it (FIT.md section 2)."""

    layer: int
    kind: str
    n_bundles: int
    hidden_size: int
    unit: int
    form: dict[str, Any] = field(hash=False)
    thresholds: tuple[float, ...] = ()
    recall: tuple[float, ...] = ()
    precision: tuple[float, ...] = ()
    offset: int = 0
    n_bytes: int = 0
    sha256: str = ""


class Scratch:
    """Buffers that the predictors of one fit share: one of them works at a time."""

    def __init__(self, kernels: KernelSet, layers: list[FittedLayer]):
        most = max(layer.n_bundles for layer in layers)
        widest = max(layer.hidden_size for layer in layers)
        self.activations: Activations = kernels.activations(1, widest)
        self.raw = np.zeros((1, most), np.float32)
        self.wanted = np.zeros(most, bool)
        self.ids = np.zeros(most, np.int32)
        self.count = np.zeros(1, np.int64)

    @staticmethod
    def bytes_needed(layers: list[FittedLayer]) -> int:
        """What it holds, and the int64 ids that NumPy makes in passing."""
        most = max(layer.n_bundles for layer in layers)
        return Scratch.bytes_for(most, max(layer.hidden_size for layer in layers))

    @staticmethod
    def bytes_for(n_bundles: int, hidden_size: int) -> int:
        """The same for the largest layer's shape."""
        return Activations.bytes_needed(1, hidden_size) + n_bundles * (4 + 1 + 4 + 8)


class FittedPredictor(Predictor):
    """A predictor of a .fit file: `weights` is the part of its section that stays in memory.

    A kind says how many bytes its section has (`section_bytes`, `weight_bytes` of them weights),
    reads the rest of it once (`_read_rest`, which refuses what FIT.md refuses) and makes `scores`.
    """

    _in_order = False  # a row is the bundle of its number

    def __init__(
        self, path: object, layer: FittedLayer, weights: np.ndarray, rest: np.ndarray,
        threshold: float, kernels: KernelSet, scratch: Scratch,
    ):  # fmt: skip
        super().__init__(layer.n_bundles)
        self.path, self.layer, self.kernels, self.scratch = path, layer, kernels, scratch
        self._x_piece = PieceView.of_rows("int8", 1, layer.hidden_size)
        self.resident_bytes = self.bytes_kept(layer)
        self._cut = self._read_rest(weights, rest, threshold)

    @classmethod
    @abstractmethod
    def form_problem(cls, layer: FittedLayer) -> tuple[str, object, object] | None:
        """(where, expected, found) when `layer.form` breaks FIT.md, else None."""

    @classmethod
    @abstractmethod
    def weight_bytes(cls, layer: FittedLayer) -> int:
        """Bytes at the section's start that stay in memory as they are; a multiple of 8."""

    @classmethod
    @abstractmethod
    def rest_bytes(cls, layer: FittedLayer) -> int:
        """Bytes after them that are read once."""

    @classmethod
    @abstractmethod
    def bytes_kept(cls, layer: FittedLayer) -> int:
        """`resident_bytes`, known before anything is loaded; scratch is the fit's."""

    @abstractmethod
    def _read_rest(self, weights: np.ndarray, rest: np.ndarray, threshold: float) -> np.ndarray:
        """float32, one per row: the raw value above which a row's bundle is predicted."""

    @abstractmethod
    def score(self, x: np.ndarray) -> None:
        """Make `scores`: by calling operators on arrays that stay where they are, and by nothing
        else."""

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """Rows that are scored."""

    @property
    def scores(self) -> np.ndarray:
        """float32 [1, n_rows] of the scratch."""
        return self.scratch.raw[:, : self.n_rows]

    @abstractmethod
    def _bundles(self, rows: np.ndarray) -> np.ndarray:
        """Bundle ids of `rows`, in any order."""

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Ids in the fit's scratch: valid until the next `predict` of any of its layers."""
        self.score(x)
        return self.chosen()

    def chosen(self) -> np.ndarray:
        """What the scores that were made last say."""
        s, n = self.scratch, self.n_bundles
        self.choose(s.count)
        rows = s.ids[: int(s.count[0])]
        if self.in_order:
            return rows
        bundles, wanted = self._bundles(rows), s.wanted[:n]
        wanted.fill(False)
        if self.layer.unit == 1:
            wanted[bundles] = True
        else:
            self._spread(bundles, wanted)
        found = np.flatnonzero(wanted)
        ids = s.ids[: found.size]
        ids[:] = found
        return ids

    def choose(self, count: np.ndarray) -> None:
        """The rows whose scores are high enough, ascending, to the front of the scratch's `ids`;
        how many into int64 count[0].  One operator."""
        self.kernels.above(self.scores, self._cut, self.scratch.ids, count)

    @property
    def chosen_ids(self) -> np.ndarray:
        """Where `choose` puts them: int32, room for every row."""
        return self.scratch.ids[: self.n_rows]

    @property
    def in_order(self) -> bool:
        """Whether a row is the bundle of its number, so that `choose` says it all."""
        return self._in_order and self.layer.unit == 1

    def _spread(self, bundles: np.ndarray, wanted: np.ndarray) -> None:
        """Where one member of a unit is predicted, all of it is."""
        unit, whole = self.layer.unit, len(wanted) // self.layer.unit
        units = np.unique(bundles // unit)
        last = units[units >= whole]  # at most one, shorter than a unit
        wanted[: whole * unit].reshape(whole, unit)[units[units < whole]] = True
        if last.size:
            wanted[whole * unit :] = True

    def _refuse(self, where: str, good: bool, expected: object, found: object) -> None:
        if not good:
            place = f"layer {self.layer.layer}: {where}"
            raise FormatError(self.path, place, expected, found)

    def _finite(self, where: str, values: np.ndarray) -> None:
        self._refuse(where, bool(np.isfinite(values).all()), "finite values", "inf or nan")
