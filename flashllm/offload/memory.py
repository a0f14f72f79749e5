"""The arena of a store, and which of it is in use: the slots of planes and the stages of the ring.

Every region has its address for as long as the store lives; what shrinks is how much of it is
touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ..cache.arena import REGION_ALIGNMENT, Arena
from ..cache.segment import Segment
from ..errors import UsageError
from ..units import align_up
from .frames import spaced
from .sizing import regions, stage_areas
from .stream import Stage

_RINGS = ("stream ring", "stream ring, decoded")


class StoreMemory:
    """Regions as `sizing.regions` cuts them; no stage of the ring is in use at first."""

    def __init__(
        self, container, *, resident: Mapping[str, int], most: Mapping[str, int],
        stage_bytes: int, ring_reserve: int, demand_bytes: int, huge_pages: bool,
    ):  # fmt: skip
        sizes, at_first = (
            regions(container, resident=kept, stage_bytes=stage_bytes, ring_stages=stages,
                    demand_bytes=demand_bytes)
            for kept, stages in ((most, ring_reserve), (resident, 0))
        )  # fmt: skip
        self.arena = Arena(
            sizes, huge_pages=huge_pages, touched={k: at_first.get(k, 0) for k in sizes}
        )
        areas = stage_areas(container, stage_bytes)
        self._ring = [(self.arena[ring].address, n) for ring, n in zip(_RINGS, areas, strict=True)]
        places = [spaced(at, n, ring_reserve).tolist() for at, n in self._ring]
        self._stages = list(map(Stage, *places))

    def ring(self, before: int, n_stages: int) -> list[Stage]:
        """The first `n_stages` stages, where `before` were in use: the memory of the others is
        given back, of new ones taken."""
        if not 0 <= n_stages <= len(self._stages):
            raise UsageError(f"{n_stages} ring stages, the store was made for {len(self._stages)}")
        change = self.arena.take if n_stages > before else self.arena.give_back
        for address, each in self._ring:
            low, high = sorted((before, n_stages))
            change(address + low * each, (high - low) * each)
        return self._stages[:n_stages]

    def give_back_slots(self, segment: Segment) -> None:
        """Give back what lies beyond the slots that a segment uses."""
        self.arena.give_back(*self._beyond(segment, segment.n_slots))

    def take_slots(self, segment: Segment, n_slots: int) -> None:
        """Take the slots that a segment lacks to use `n_slots`."""
        address, n_bytes = self._beyond(segment, segment.n_slots)
        self.arena.take(address, n_bytes - self._beyond(segment, n_slots)[1])

    def _beyond(self, segment: Segment, n_slots: int) -> tuple[int, int]:
        """(address, bytes) of a segment's slots from `n_slots` on, to the end of its last page."""
        if not segment.n_most:
            return self.arena.address, 0
        region = self.arena[f"slots of {segment.name}"]
        used = n_slots * segment.slot_bytes
        return region.address + used, align_up(region.n_bytes, REGION_ALIGNMENT) - used

    def in_use(self, segments: Iterable[Segment], n_stages: int) -> list[np.ndarray]:
        """uint8 views of the slots and ring stages in use."""
        kept = [(self.arena[f"slots of {segment.name}"].address,
                 segment.n_slots * segment.slot_bytes)
                for segment in segments if segment.n_slots]
        ring = [(address, n_stages * each) for address, each in self._ring]
        return [self.arena.view(address, n) for address, n in kept + ring if n]
