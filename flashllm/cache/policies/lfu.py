"""Least frequently used, with decay: a slot's heat is the sum of decay**age over its uses.

Heat starts anew with each frame that a slot receives.  Instead of cooling every slot at every step,
a use is worth more the later it comes, decay**-clock, and the order is the same: nothing but the
slots that are used has to be touched.
"""

from __future__ import annotations

import math

import numpy as np

from .base import Policy, lowest

MOST_WORTH = 1e200  # of a use: then all heat is scaled down


class LFU(Policy):
    """`heat` float64[n_slots], of which the lowest are the victims: a use at `clock` adds
    worth(clock) to its slot's, a new frame sets it to that."""

    name = "lfu"
    bytes_per_slot = 8

    def __init__(self, n_slots: int, *, decay: float = 0.99):
        super().__init__(n_slots)
        if not 0 < decay <= 1:
            raise AssertionError(f"a decay of {decay} per step")
        self.decay = decay
        self.heat = np.zeros(n_slots, dtype=np.float64)
        self._since = 0  # the clock at which a use was worth 1
        self._longest = math.inf if decay == 1 else math.log(MOST_WORTH) / -math.log(decay)

    def worth(self, clock: int) -> float:
        """Of a use at `clock`, which never goes back."""
        age = clock - self._since
        if age > self._longest:
            self.heat *= self.decay**age
            self._since, age = clock, 0
        return self.decay**-age

    def admit(self, slots: np.ndarray, frames: np.ndarray, clock: int) -> None:
        self.heat[slots] = self.worth(clock)

    def observe(self, slots: np.ndarray, clock: int) -> None:
        worth = self.worth(clock)  # first: it may scale all of them down
        self.heat[slots] += worth

    def victims(self, n: int, barred: np.ndarray) -> np.ndarray:
        return lowest(self.heat, n, barred)
