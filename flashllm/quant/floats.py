"""f32, f16, bf16: the value itself, rounded to nearest even.  Decoding is exact.

A value whose rounding is infinite is refused: a saturated weight would be a silent change of the
model, and checkpoints that hold one are broken or were meant for another type.
"""

from __future__ import annotations

import numpy as np

from .base import WeightType


class F32(WeightType):
    """IEEE binary32, as it is."""

    name, code, group_size = "f32", 0, 1

    def row_bytes(self, n_cols: int) -> int:
        return 4 * n_cols

    def _encode(self, rows: np.ndarray) -> np.ndarray:
        return rows.astype("<f4").view(np.uint8)

    def _decode(self, raw: np.ndarray, n_cols: int) -> np.ndarray:
        return raw.view("<f4").astype(np.float32)

    def error_bound(self, rows: np.ndarray) -> np.ndarray:
        return np.zeros(rows.shape, dtype=np.float32)


class F16(WeightType):
    """IEEE binary16: 11 significant bits, largest value 65504, smallest step 2^-24."""

    name, code, group_size = "f16", 1, 1

    def row_bytes(self, n_cols: int) -> int:
        return 2 * n_cols

    def _encode(self, rows: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # refused by name just below
            halves = rows.astype("<f2")
        self._refuse(rows, ~np.isfinite(halves), "is beyond 65504")
        return halves.view(np.uint8)

    def _decode(self, raw: np.ndarray, n_cols: int) -> np.ndarray:
        return raw.view("<f2").astype(np.float32)

    def error_bound(self, rows: np.ndarray) -> np.ndarray:
        return np.maximum(np.abs(rows) * np.float32(2.0**-11), np.float32(2.0**-25))


class BF16(WeightType):
    """The upper half of binary32: 8 significant bits, the same range."""

    name, code, group_size = "bf16", 2, 1

    def row_bytes(self, n_cols: int) -> int:
        return 2 * n_cols

    def _encode(self, rows: np.ndarray) -> np.ndarray:
        bits = rows.view(np.uint32)
        # Nearest even: add half a step less one, plus the last kept bit.  Finite input, no wrap.
        halves = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype("<u2")
        self._refuse(rows, (halves & 0x7FFF) == 0x7F80, "rounds to infinity")
        return halves.view(np.uint8)

    def _decode(self, raw: np.ndarray, n_cols: int) -> np.ndarray:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)

    def error_bound(self, rows: np.ndarray) -> np.ndarray:
        return np.maximum(np.abs(rows) * np.float32(2.0**-8), np.float32(2.0**-134))
