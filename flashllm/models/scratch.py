"""Working memory of a forward pass, allocated once and counted in the ledger.

Every buffer is flat and handed out as a contiguous [n_tokens, n] view, because the kernels want
contiguous rows whatever the number of tokens in this chunk.
"""

from __future__ import annotations

import mmap

import numpy as np


def own_pages(shape: tuple[int, ...], dtype: np.dtype, value: float = 0.0) -> np.ndarray:
    """An array all of whose pages are charged now, not in mid-sentence, and go back to the kernel
    when it is dropped: what malloc frees it may keep."""
    n = int(np.prod(shape))
    if n == 0:
        return np.empty(shape, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # or a forked child would write into ours
    pages = mmap.mmap(-1, n * np.dtype(dtype).itemsize, flags=flags)
    array = np.frombuffer(pages, dtype, n).reshape(shape)
    array.fill(value)
    return array


class Scratch:
    """Named float32 buffers of `max_tokens` rows each."""

    def __init__(self, widths: dict[str, int], max_tokens: int):
        self.max_tokens = max_tokens
        self._widths = dict(widths)
        self._flat = {name: own_pages((n * max_tokens,), np.float32) for name, n in widths.items()}

    @staticmethod
    def bytes_needed(widths: dict[str, int], max_tokens: int) -> int:
        return 4 * max_tokens * sum(widths.values())

    @property
    def n_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._flat.values())

    def view(self, name: str, n_tokens: int, width: int | None = None) -> np.ndarray:
        """float32 [n_tokens, width]; `width` may be anything up to the declared one."""
        width = self._widths[name] if width is None else width
        return self._flat[name][: n_tokens * width].reshape(n_tokens, width)
