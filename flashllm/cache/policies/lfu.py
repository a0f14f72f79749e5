"""Least frequently used, with decay: a slot's heat is the sum of decay**age over its uses.

Heat starts anew with each frame that a slot receives.  It is brought up to date only when looked
at: `heat` is as of `stamp`.
"""

from __future__ import annotations

import numpy as np

from .base import Policy, lowest


class LFU(Policy):
    name = "lfu"
    bytes_per_slot = 16

    def __init__(self, n_slots: int, *, decay: float = 0.99):
        super().__init__(n_slots)
        if not 0 < decay <= 1:
            raise AssertionError(f"a decay of {decay} per step")
        self.decay = decay
        self._clock = 0
        self._heat = np.zeros(n_slots, dtype=np.float64)
        self._stamp = np.zeros(n_slots, dtype=np.int64)

    def admit(self, slots: np.ndarray, frames: np.ndarray, clock: int) -> None:
        self._clock = clock
        self._heat[slots] = 1.0
        self._stamp[slots] = clock

    def observe(self, slots: np.ndarray, clock: int) -> None:
        self._clock = clock
        self._heat[slots] = 1.0 + self._heat[slots] * self.decay ** (clock - self._stamp[slots])
        self._stamp[slots] = clock

    def victims(self, n: int, barred: np.ndarray) -> np.ndarray:
        heat = self._heat * self.decay ** (self._clock - self._stamp)
        return lowest(heat, n, barred)
