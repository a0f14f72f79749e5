"""Window: what the last `k` steps used stays ("LLM in a flash", windowing).

Slots that have fallen out of the window are victims in slot order, whatever their age; only when
the window itself does not fit do its oldest members follow.
"""

from __future__ import annotations

import numpy as np

from .base import Policy, lowest


class Window(Policy):
    name = "window"
    bytes_per_slot = 8

    def __init__(self, n_slots: int, *, k: int = 5):
        super().__init__(n_slots)
        if k < 1:
            raise AssertionError(f"a window of {k} steps")
        self.k = k
        self._clock = 0
        self._last_use = np.full(n_slots, -k, dtype=np.int64)

    def admit(self, slots: np.ndarray, frames: np.ndarray, clock: int) -> None:
        self.observe(slots, clock)

    def observe(self, slots: np.ndarray, clock: int) -> None:
        self._clock = clock
        self._last_use[slots] = clock

    def victims(self, n: int, barred: np.ndarray) -> np.ndarray:
        # 0 outside the window; 1 (oldest) .. k (this step) inside.
        rank = np.maximum(self._last_use - (self._clock - self.k), 0)
        return lowest(rank, n, barred)
