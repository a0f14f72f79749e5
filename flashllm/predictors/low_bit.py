"""Low bit: a copy of the deciding matrix in 1 to 6 bits a weight, as many as each neuron is worth.

score = scale * dot(levels, x) + bias.  How bits are chosen and weights rounded, so that the
rounding of one column makes up for that of another, is in calibration/low_bit.py.
"""

from __future__ import annotations

import numpy as np

from ..kernels.base import MAX_PLANES, low_bit_row_bytes
from .scores import OBJECT_BYTES, FittedLayer, FittedPredictor


class LowBitPredictor(FittedPredictor):
    name = "low_bit"

    @staticmethod
    def id_type(n_bundles: int) -> np.dtype:
        return np.dtype("<u2" if n_bundles <= 65536 else "<u4")

    @classmethod
    def form_problem(cls, layer: FittedLayer) -> tuple[str, object, object] | None:
        rows = layer.form.get("rows")
        if set(layer.form) != {"rows"}:
            return "form", "rows", sorted(layer.form)
        good = isinstance(rows, list) and len(rows) == MAX_PLANES and all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= layer.n_bundles
            for n in rows
        )  # fmt: skip
        if not good or not 1 <= sum(rows) <= layer.n_bundles:
            return "form rows", f"{MAX_PLANES} counts of at most {layer.n_bundles} rows", rows
        return None

    @classmethod
    def weight_bytes(cls, layer: FittedLayer) -> int:
        return sum(
            n * low_bit_row_bytes(layer.hidden_size, planes)
            for planes, n in enumerate(layer.form["rows"], start=1)
        )

    @classmethod
    def rest_bytes(cls, layer: FittedLayer) -> int:
        return sum(layer.form["rows"]) * (8 + cls.id_type(layer.n_bundles).itemsize)

    @classmethod
    def bytes_kept(cls, layer: FittedLayer) -> int:
        per_row = 4 + cls.id_type(layer.n_bundles).itemsize
        return cls.weight_bytes(layer) + sum(layer.form["rows"]) * per_row + OBJECT_BYTES

    def _read_rest(self, weights: np.ndarray, rest: np.ndarray, threshold: float) -> np.ndarray:
        counts, n = self.layer.form["rows"], sum(self.layer.form["rows"])
        scale, bias = rest[: 4 * n].view("<f4"), rest[4 * n : 8 * n].view("<f4")
        self._ids = rest[8 * n :].view(self.id_type(self.n_bundles)).copy()
        self._finite("scale", scale)
        self._finite("bias", bias)
        self._refuse("scale", bool((scale > 0).all()), "positive values", "others")
        self._parts: list[tuple[int, np.ndarray, slice]] = []
        seen, row, at = np.zeros(self.n_bundles, bool), 0, 0
        for planes, count in enumerate(counts, start=1):
            if not count:
                continue
            width = low_bit_row_bytes(self.layer.hidden_size, planes)
            rows = weights[at : at + count * width].reshape(count, width)
            where = slice(row, row + count)
            self._check_part(self._ids[where], seen)
            self._parts.append((planes, rows, where))
            row, at = row + count, at + count * width
        # In float64: a far threshold over a small scale ends as infinity at worst, never as nan.
        with np.errstate(over="ignore"):
            cut = (threshold - bias.astype(np.float64)) / scale
            return cut.astype(np.float32)

    def _check_part(self, ids: np.ndarray, seen: np.ndarray) -> None:
        self._refuse("ids", int(ids.max()) < self.n_bundles, f"ids below {self.n_bundles}",
                     int(ids.max()))  # fmt: skip
        ascending = bool((np.diff(ids.astype(np.int64)) > 0).all())
        self._refuse("ids", ascending and not seen[ids].any(), "ascending, each once", "others")
        seen[ids] = True

    @property
    def n_rows(self) -> int:
        return len(self._ids)

    def score(self, x: np.ndarray) -> None:
        kernels, acts = self.kernels, self.scratch.activations
        kernels.prepare(acts, x.reshape(1, -1), self._x_piece)
        raw = self.scratch.raw[0]
        for planes, rows, where in self._parts:
            kernels.low_bit(acts, rows, planes, raw[where])

    def _bundles(self, rows: np.ndarray) -> np.ndarray:
        return self._ids[rows]
