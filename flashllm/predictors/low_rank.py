"""Low rank: what a layer decides, through a bottleneck of r numbers; score = B (A x) + bias.

A is int8 by rows, B int8 or int4 by columns, so that the kernels' dot makes the r numbers and their
accumulate the scores.  How A and B come about is in calibration/low_rank.py.
"""

from __future__ import annotations

import numpy as np

from ..kernels.base import PieceView
from .scores import OBJECT_BYTES, FittedLayer, FittedPredictor

MAX_RANK = 16384
B_TYPES = ("int8", "int4")


class LowRankPredictor(FittedPredictor):
    name = "low_rank"
    _in_order = True

    @staticmethod
    def pieces(layer: FittedLayer) -> tuple[PieceView, PieceView]:
        """A's rows and B's columns."""
        rank = layer.form["rank"]
        return (
            PieceView.of_rows("int8", rank, layer.hidden_size),
            PieceView.of_rows(layer.form["weight_type"], rank, layer.n_bundles),
        )

    @classmethod
    def form_problem(cls, layer: FittedLayer) -> tuple[str, object, object] | None:
        form = layer.form
        if set(form) != {"rank", "weight_type"}:
            return "form", "rank and weight_type", sorted(form)
        rank = form["rank"]
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
            return "form rank", f"1 to {MAX_RANK}", rank
        if form["weight_type"] not in B_TYPES:
            return "form weight_type", " or ".join(B_TYPES), form["weight_type"]
        return None

    @classmethod
    def weight_bytes(cls, layer: FittedLayer) -> int:
        return sum(piece.per_frame * piece.stride for piece in cls.pieces(layer))

    @classmethod
    def rest_bytes(cls, layer: FittedLayer) -> int:
        return 4 * layer.n_bundles

    @classmethod
    def bytes_kept(cls, layer: FittedLayer) -> int:
        return cls.weight_bytes(layer) + 4 * layer.n_bundles + OBJECT_BYTES + 4 * layer.form["rank"]

    def _read_rest(self, weights: np.ndarray, rest: np.ndarray, threshold: float) -> np.ndarray:
        bias = rest.view("<f4")
        self._finite("bias", bias)
        self._weights = weights  # kept alive: the kernels get addresses
        self._a, self._b = self.pieces(self.layer)
        start = weights.ctypes.data
        self._a_at = np.array([start], np.uint64)
        self._b_at = np.array([start + self._a.per_frame * self._a.stride], np.uint64)
        self._z = np.zeros((1, self.layer.form["rank"]), np.float32)
        return (threshold - bias.astype(np.float64)).astype(np.float32)

    @property
    def n_rows(self) -> int:
        return self.n_bundles

    def score(self, x: np.ndarray) -> None:
        kernels, acts, rank = self.kernels, self.scratch.activations, self._z.shape[1]
        kernels.linear(acts, x.reshape(1, -1), self._a_at, self._a, 0, rank, self._z)
        kernels.clear(self.scores)
        kernels.accumulate_range(self._z, self._b_at, self._b, 0, rank, self.scores)

    def _bundles(self, rows: np.ndarray) -> np.ndarray:
        return rows
