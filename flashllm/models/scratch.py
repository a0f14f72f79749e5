"""Working memory of a forward pass, allocated once and counted in the ledger.

Every buffer is flat and handed out as a contiguous [n_tokens, n] view, because the kernels want
contiguous rows whatever the number of tokens in this chunk.
"""

from __future__ import annotations

import numpy as np

from .pages import LendingRows, spare_bytes


class Scratch:
    """Named float32 buffers of `max_tokens` rows each; all of them are held at first."""

    def __init__(self, widths: dict[str, int], max_tokens: int):
        self.max_tokens = max_tokens
        self._widths = dict(widths)
        self._rows = {
            name: LendingRows(1, n * max_tokens, np.float32) for name, n in widths.items()
        }
        self._flat = {name: rows.array[0] for name, rows in self._rows.items()}
        self.hold(max_tokens)

    @staticmethod
    def bytes_needed(widths: dict[str, int], max_tokens: int) -> int:
        return 4 * max_tokens * sum(widths.values())

    def hold(self, n_tokens: int) -> None:
        """Have memory for passes of so many tokens, and lend the rest."""
        for name, rows in self._rows.items():
            rows.hold(n_tokens * self._widths[name])

    def spare_bytes(self, n_tokens: int) -> int:
        """What `hold` lends."""
        return sum(
            spare_bytes(1, 4 * n * self.max_tokens, 4 * n * n_tokens)
            for n in self._widths.values()
        )

    @property
    def n_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._flat.values())

    def view(self, name: str, n_tokens: int, width: int | None = None) -> np.ndarray:
        """float32 [n_tokens, width]; `width` may be anything up to the declared one."""
        width = self._widths[name] if width is None else width
        return self._flat[name][: n_tokens * width].reshape(n_tokens, width)
