"""The contract of a weight type: how one row of float32 becomes bytes, and back.

A WeightType knows the geometry of a row and the NumPy truth of its values.  It refuses to know
files and kernels.  What stays true: rows are independent of each other; bytes are little-endian;
padding columns decode to exactly zero; what cannot be held (NaN, infinity, overflow) is an error
that names the value, never a saturated or silent one; `decode` never widens inexactly, so that
kernels can be compared with it bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from ..errors import UsageError, WeightValueError

GROUP = 32  # columns that share one scale in the integer types


class WeightType(ABC):
    """One row format.

    name        key in WEIGHT_TYPES, as written in containers
    code        the same type for C (fl_weight_type in ext/fl_kernels.h)
    group_size  columns per scale; 1 for types without scales
    """

    name: str
    code: int
    group_size: int

    @abstractmethod
    def row_bytes(self, n_cols: int) -> int:
        """Bytes of one row of `n_cols` values."""

    @abstractmethod
    def _encode(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [r, row_bytes] of checked, finite float32 rows."""

    @abstractmethod
    def _decode(self, raw: np.ndarray, n_cols: int) -> np.ndarray:
        """float32 [r, n_cols] of checked uint8 rows."""

    @abstractmethod
    def error_bound(self, rows: np.ndarray) -> np.ndarray:
        """float32 [r, n]: the most by which decode(encode(rows)) may differ, per value."""

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Bytes of float32 `rows` [r, n], as uint8 [r, row_bytes(n)].

        Raises WeightValueError, naming the first offender, for NaN, infinity and overflow.
        """
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] < 1:
            raise UsageError(f"{self.name}: rows must be [r, n >= 1], not {list(rows.shape)}")
        self._refuse(rows, ~np.isfinite(rows), "is not finite")
        return self._encode(rows)

    def decode(self, raw: np.ndarray, n_cols: int) -> np.ndarray:
        """Values of `raw` uint8 [r, row_bytes(n_cols)], as float32 [r, n_cols]."""
        raw = np.asarray(raw)
        expected = self.row_bytes(n_cols)
        if raw.dtype != np.uint8 or raw.ndim != 2 or raw.shape[1] != expected:
            raise UsageError(
                f"{self.name}: {n_cols} columns need uint8 [r, {expected}], "
                f"not {raw.dtype} {list(raw.shape)}"
            )
        return self._decode(np.ascontiguousarray(raw), n_cols)

    def _refuse(self, rows: np.ndarray, bad: np.ndarray, why: str) -> None:
        """Raise for the first value where `bad`."""
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise WeightValueError(self.name, row, column, float(rows[row, column]), why)


def n_groups(n_cols: int) -> int:
    """Groups of 32 columns in a row, the last one padded."""
    return -(-n_cols // GROUP)


def grouped(rows: np.ndarray) -> np.ndarray:
    """float32 [r, groups, 32] of `rows` [r, n], padded with zeros."""
    r, n = rows.shape
    groups = n_groups(n)
    if n == groups * GROUP:
        return rows.reshape(r, groups, GROUP)
    padded = np.zeros((r, groups * GROUP), dtype=np.float32)
    padded[:, :n] = rows
    return padded.reshape(r, groups, GROUP)
