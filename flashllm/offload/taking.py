"""Taking frames: what a request does to a sparse plane's slots before anything is read.

All hits are pinned before anything is evicted; victims make room for what is missing; where that
is not enough, what was used last gets the slots there are.  `Taker.take` does it in one native call
where the policy is LFU (ext/fl_slots.c), `take_slowly` in some 25 of NumPy, each of which finds its
code pushed out of the caches by weights (4.5 ms more for a token of a 1.1 B with 12 layers).
`Taker.request` is one native call to the reads that bring what is missing (ext/fl_request.c).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._core import Request
from ..cache.policies.base import lowest
from .state import PlaneState

NO_SLOTS = np.empty(0, dtype=np.int32)


@dataclass(slots=True)
class Taken:
    """What a request holds until `end`.

    hits     int32 slots of what is there, pinned
    missing  int32 frames that are not there, in the order asked for
    placed   int32 slots, pinned, of those of them that have one
    targets  uint64[len(missing)] where each is to be read; 0: it has no slot
    unused_bytes  of victims that were prefetched and never used
    """

    hits: np.ndarray
    missing: np.ndarray
    placed: np.ndarray
    targets: np.ndarray
    unused_bytes: int = 0


class Taker:
    """Takes for all planes of a store, in one working memory."""

    def __init__(self) -> None:
        self._scratch = NO_SLOTS

    def take(self, state: PlaneState, frames: np.ndarray, clock: int, *, admit: bool) -> Taken:
        """Take these frames, int32 ascending.  With `admit` victims make room and the frames'
        use is remembered, without it what is missing gets free slots only."""
        tables, segment, n = state.tables, state.segment, len(frames)
        if tables is None:
            return take_slowly(state, frames, clock, admit=admit)
        if len(self._scratch) < max(n, segment.n_most):
            self._scratch = np.empty(segment.n_frames, dtype=np.int32)
        answer, targets = np.empty((4, n), dtype=np.int32), np.empty(n, dtype=np.uint64)
        n_hits, n_missing, n_placed, n_unused, n_evicted = tables.take(
            frames, segment.n_slots, segment.n_used, state.policy.worth(clock), clock, admit,
            answer, targets, self._scratch,
        )  # fmt: skip
        segment.n_used += n_placed - n_evicted
        if n_placed or n_evicted:
            state.residency_changed()
        unused = state.source.tables.n_bytes(answer[3, :n_unused]) if n_unused else 0
        hits, missing, placed = answer[0, :n_hits], answer[1, :n_missing], answer[2, :n_placed]
        return Taken(hits, missing, placed, targets[:n_missing], unused)

    def request(
        self, state: PlaneState, ids: np.ndarray, clock: int, *, admit: bool, max_extent: int,
        max_frames: int,
    ) -> tuple[Request, tuple[int, int, int]]:  # fmt: skip
        """`take` of the frames of items, int32 ascending, of a plane with tables, and the extents
        of what is missing.  Also (items absent, their bytes, bytes of victims never used)."""
        segment, source = state.segment, state.source
        request = Request(
            state.tables, source.tables, ids, source.per_frame, segment.n_slots, segment.n_used,
            state.policy.worth(clock), clock, admit, state.max_gap, max_extent, max_frames,
        )  # fmt: skip
        n_more, changed, *counts = request.counts()
        if changed:
            segment.n_used += n_more
            state.residency_changed()
        return request, counts

    def end(self, state: PlaneState, taken: Taken) -> None:
        """Unpin what was taken; empty the slots of what has not arrived."""
        if state.tables is None or not state.tables.end(taken.hits, taken.placed):
            end_slowly(state, taken)

    def end_request(self, state: PlaneState, request: Request) -> None:
        """The same of a request."""
        if not request.end():
            hits, placed = (np.array(slots, dtype=np.int32) for slots in request.slots_held())
            end_slowly(state, Taken(hits, NO_SLOTS, placed, NO_SLOTS))


def take_slowly(state: PlaneState, frames: np.ndarray, clock: int, *, admit: bool) -> Taken:
    """As `Taker.take`, for any policy and frames in any order, some of which may be on their way
    into their slots: those are neither hits nor missing."""
    segment, policy = state.segment, state.policy
    slots = segment.frame_slot[frames]
    missing, hits = frames[slots < 0], slots[segment.addresses[frames] != 0]
    recency = state.last_use[missing]
    if admit:
        state.last_use[frames] = clock
    if len(hits):
        segment.pin(hits)
        state.prefetched[hits] = False
        if admit:
            policy.observe(hits, clock)
    taken = Taken(hits, missing, NO_SLOTS, np.zeros(len(missing), dtype=np.uint64))
    if len(missing) and segment.n_slots:
        if admit:
            taken.unused_bytes = state.make_room(len(missing))
        chosen = most_recent(recency, segment.n_free)
        placed = taken.placed = segment.place(missing[chosen])
        if len(placed):
            state.residency_changed()
            policy.admit(placed, missing[chosen], clock)
            taken.targets[chosen] = segment.slot_address[placed]
    return taken


def end_slowly(state: PlaneState, taken: Taken) -> None:
    """As `Taker.end`."""
    if len(taken.hits):
        state.segment.unpin(taken.hits)
    end_placed(state, taken.placed)


def end_placed(state: PlaneState, placed: np.ndarray) -> None:
    """Unpin what has arrived; empty the slots of what has not (an error, a dropped lease)."""
    if not len(placed):
        return
    segment = state.segment
    arrived = segment.addresses[segment.slot_frame[placed]] != 0
    segment.unpin(placed[arrived])
    if not arrived.all():
        segment.abandon(placed[~arrived])
        state.residency_changed()


def most_recent(last_use: np.ndarray, n: int) -> np.ndarray:
    """Positions, ascending, of the `n` latest uses: which misses get the slots there are."""
    if n >= len(last_use):
        return np.arange(len(last_use))
    return lowest(-last_use, n, np.zeros(len(last_use), dtype=bool))
