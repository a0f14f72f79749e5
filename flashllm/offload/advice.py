"""Advice: frames read into slots because they may soon be asked for.

One advice a plane at a time; it evicts nothing that is pinned, takes at most half of the slots and
is never waited for here.  Its slots stay pinned until `settle` takes them in or drops them.
"""

from __future__ import annotations

import time

import numpy as np

from ..errors import ChecksumError, FlashReadError
from ..units import MIB
from .demand import Demand
from .fetch import Fetcher
from .planner import Extents
from .state import PlaneState, Prefetch
from .stats import StepStats
from .taking import NO_SLOTS

MAX_EXTENT = MIB


class Adviser:
    """Starts advised reads, takes in what they brought."""

    def __init__(self, fetcher: Fetcher, demand: Demand):
        self._fetcher, self._demand = fetcher, demand
        self.stats = StepStats()  # the store puts each step's here

    def extents(self, state: PlaneState, frames: np.ndarray) -> Extents:
        return self._demand.extents(
            state.source, frames, max_gap=state.max_gap, max_extent=MAX_EXTENT
        )

    def prefetch(
        self, state: PlaneState, ids: np.ndarray, clock: int, beside: np.ndarray | None = None
    ) -> None:
        """Start reading absent frames of `ids` into slots; see WeightStore.prefetch."""
        segment, source = state.segment, state.source
        self.settle(state, clock, wait=False)
        frames = distinct(ids // source.per_frame)
        missing = frames[segment.frame_slot[frames] < 0]
        if state.prefetch is not None or source.coded:
            # One advice at a time; coded frames would need a raw area of their own meanwhile.
            self.stats.prefetch_dropped += len(missing)
            return
        # Advice never takes more than half of the slots: the other half has proved its use.
        n = min(len(missing), segment.n_slots // 2)
        kept = NO_SLOTS
        if beside is not None:
            kept = segment.frame_slot[distinct(beside // source.per_frame)]
            kept = kept[kept >= 0]
        segment.pin(kept)
        self.stats.prefetch_unused_bytes += state.make_room(n)
        segment.unpin(kept)
        n = min(n, segment.n_free)
        self.stats.prefetch_dropped += len(missing) - n
        if n == 0:
            return
        missing = missing[:n]
        placed = segment.place(missing)
        state.residency_changed()
        try:
            extents = self.extents(state, missing)
            fetch = self._fetcher.start_frames(
                source, extents, 0, len(extents), segment.slot_address[placed], ahead=True
            )
        except BaseException:
            segment.abandon(placed)
            raise
        _, lengths = source.places(missing)
        state.prefetch = Prefetch(fetch, placed, lengths)
        self.stats.prefetch_bytes += extents.n_bytes
        self.stats.prefetch_reads += len(extents)

    def settle(self, state: PlaneState, clock: int, *, wait: bool = True) -> bool:
        """Take in what a prefetch has brought; a failed one is dropped and counted (and False
        comes back), since the same frames will be asked for properly if they are needed."""
        pending = state.prefetch
        if pending is None:
            return True
        fetch = pending.fetch
        if not wait and fetch.done() < len(fetch.extents):
            return True
        start = time.perf_counter_ns()
        try:
            fetch.wait()
        except (FlashReadError, ChecksumError):
            self.stats.prefetch_dropped += len(pending.slots)
            self.drop_prefetch(state)
            return False
        finally:
            self.stats.wait_ns += time.perf_counter_ns() - start
        fetch.close()
        segment = state.segment
        segment.publish(pending.slots)
        segment.unpin(pending.slots)
        state.prefetched[pending.slots] = True
        state.policy.admit(pending.slots, segment.slot_frame[pending.slots], clock)
        state.prefetch = None
        return True

    def drop_prefetch(self, state: PlaneState) -> None:
        """Wait for a prefetch's reads and forget what they brought."""
        pending = state.prefetch
        if pending is not None:
            pending.fetch.close()
            state.segment.abandon(pending.slots)
            state.residency_changed()
            state.prefetch = None


def distinct(frames: np.ndarray) -> np.ndarray:
    """The distinct values of an ascending int32 array."""
    if len(frames) < 2:
        return frames
    keep = np.empty(len(frames), dtype=bool)
    keep[0] = True
    np.not_equal(frames[1:], frames[:-1], out=keep[1:])
    return frames[keep]
