"""Belady's ceiling: evicts what is needed again last.  Offline: it is told the future.

`future[clock]` holds the frames used at that clock, as int arrays.  For simulations and for judging
the other policies; no engine can run it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import Policy, lowest


class Belady(Policy):
    name = "belady"
    bytes_per_slot = 4

    def __init__(self, n_slots: int, *, future: Sequence[np.ndarray]):
        super().__init__(n_slots)
        self._n_clocks = len(future)
        frames = np.concatenate([np.asarray(f, dtype=np.int64) for f in future])
        clocks = np.repeat(np.arange(len(future), dtype=np.int64), [len(f) for f in future])
        # One sorted key per use, so that the next use of many frames is one binary search.
        self._uses = np.sort(frames * (self._n_clocks + 1) + clocks)
        self._frame = np.full(n_slots, -1, dtype=np.int64)
        self._clock = 0

    def admit(self, slots: np.ndarray, frames: np.ndarray, clock: int) -> None:
        self._clock = clock
        self._frame[slots] = frames

    def observe(self, slots: np.ndarray, clock: int) -> None:
        self._clock = clock

    def victims(self, n: int, barred: np.ndarray) -> np.ndarray:
        row = self._n_clocks + 1
        at = np.searchsorted(self._uses, self._frame * row + self._clock, side="right")
        following = np.append(self._uses, np.iinfo(np.int64).max)[at]
        same = following // row == self._frame
        next_use = np.where(same, following % row, self._n_clocks)
        return lowest(-next_use, n, barred)
