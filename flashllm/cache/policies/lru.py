"""Least recently used: the slot whose last use lies furthest back goes first."""

from __future__ import annotations

import numpy as np

from .base import Policy, lowest


class LRU(Policy):
    name = "lru"
    bytes_per_slot = 8

    def __init__(self, n_slots: int):
        super().__init__(n_slots)
        self._last_use = np.full(n_slots, -1, dtype=np.int64)

    def admit(self, slots: np.ndarray, frames: np.ndarray, clock: int) -> None:
        self._last_use[slots] = clock

    def observe(self, slots: np.ndarray, clock: int) -> None:
        self._last_use[slots] = clock

    def victims(self, n: int, barred: np.ndarray) -> np.ndarray:
        return lowest(self._last_use, n, barred)
