"""Arrays on pages of their own: charged when we say, and the kernel's again when we say.

What malloc frees it may keep, and what nobody has touched yet is charged in mid-sentence; arrays
that a plan counts are neither.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np

PAGE = mmap.PAGESIZE
CAN_LEND = hasattr(mmap, "MADV_DONTNEED")


def own_pages(shape: tuple[int, ...], dtype: np.dtype, value: float = 0.0) -> np.ndarray:
    """An array all of whose pages are charged now, and go back to the kernel when it is dropped."""
    n = int(np.prod(shape))
    if n == 0:
        return np.empty(shape, dtype)
    array = np.frombuffer(_private(n * np.dtype(dtype).itemsize), dtype, n).reshape(shape)
    array.fill(value)
    return array


def spare_bytes(n_rows: int, row_bytes: int, held_bytes: int) -> int:
    """What `LendingRows.hold` gives back: whole pages behind the first `held_bytes` of each row."""
    first, last = _spare_pages(n_rows, row_bytes, held_bytes)
    return PAGE * int((last - first).sum())


class LendingRows:
    """An array [n_rows, width] of which every row is in use up to a common column; the whole pages
    behind it are the kernel's until more is held.  None is charged before the first `hold`.

    What lies behind the column is lost, and zero when it is held again.
    """

    def __init__(self, n_rows: int, width: int, dtype: np.dtype):
        self._row_bytes = width * np.dtype(dtype).itemsize
        self._map = _private(max(1, n_rows * self._row_bytes))
        with suppress(AttributeError, OSError):  # a huge page would not go back piece by piece
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.array = np.frombuffer(self._map, dtype, n_rows * width).reshape(n_rows, width)
        self._held = 0

    def hold(self, n_columns: int) -> None:
        """Have memory for the first `n_columns` of each row, and lend the rest."""
        if n_columns > self._held:
            self.array[:, self._held : n_columns] = 0
        elif n_columns < self._held and CAN_LEND:
            held_bytes = n_columns * self.array.itemsize
            first, last = _spare_pages(len(self.array), self._row_bytes, held_bytes)
            some = last > first
            for a, b in zip(first[some].tolist(), last[some].tolist(), strict=True):
                self._map.madvise(mmap.MADV_DONTNEED, a * PAGE, (b - a) * PAGE)
        self._held = n_columns  # last: an interruption leaves what is done again


def _private(n_bytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, n_bytes)
    # or a forked child would write into ours
    return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _spare_pages(n_rows: int, row_bytes: int, held_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """First page and page after the last of what each row can lend; equal where nothing."""
    starts = np.arange(n_rows if CAN_LEND else 0, dtype=np.int64) * row_bytes
    first, last = -(-(starts + held_bytes) // PAGE), (starts + row_bytes) // PAGE
    return first, np.maximum(first, last)
