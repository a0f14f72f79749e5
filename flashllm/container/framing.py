"""Items of one plane in any portions -> whole frames."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import UsageError
from .base import PlaneShape


class Framer:
    """Cuts the items of a plane into frames.  Memory: one frame."""

    def __init__(self, shape: PlaneShape):
        self.shape = shape
        self.n_items = 0  # given so far
        self._frame = np.zeros((shape.per_frame, shape.stride), np.uint8)
        self._n_waiting = 0

    def frames_of(self, items: np.ndarray) -> Iterator[np.ndarray]:
        """The frames uint8[per_frame, stride] that `items` uint8[k, stride] complete.

        Each is valid until the next one is asked for.  UsageError for items that do not fit.
        """
        self._check(items)
        items = np.ascontiguousarray(items)
        per_frame = self.shape.per_frame
        self.n_items += len(items)
        if self._n_waiting:
            n = min(per_frame - self._n_waiting, len(items))
            self._frame[self._n_waiting : self._n_waiting + n] = items[:n]
            self._n_waiting += n
            items = items[n:]
            if self._n_waiting == per_frame:
                self._n_waiting = 0
                yield self._frame
        while len(items) >= per_frame:
            yield items[:per_frame]
            items = items[per_frame:]
        if len(items):
            self._frame[: len(items)] = items
            self._n_waiting = len(items)

    def last_frame(self) -> np.ndarray | None:
        """The last frame, filled up with zeros, if it is not out yet; UsageError if items are
        missing."""
        shape = self.shape
        if self.n_items != shape.n_items:
            raise UsageError(f"plane {shape.name} has {self.n_items} of {shape.n_items} items")
        if not self._n_waiting:
            return None
        self._frame[self._n_waiting :] = 0
        self._n_waiting = 0
        return self._frame

    def _check(self, items: np.ndarray) -> None:
        shape = self.shape
        if items.ndim != 2 or items.dtype != np.uint8 or items.shape[1] != shape.stride:
            found = f"{items.dtype}{list(items.shape)}"
            raise UsageError(f"plane {shape.name} takes uint8[k, {shape.stride}], not {found}")
        if any(items[:, start:stop].any() for start, stop in shape.gaps):
            raise UsageError(f"plane {shape.name}: bytes between pieces must be zero")
        if self.n_items + len(items) > shape.n_items:
            found = self.n_items + len(items)
            raise UsageError(f"plane {shape.name} has {shape.n_items} items, not {found}")
