"""Picking: bundles of a sparse plane from its slots, misses read into victims' slots or through.

Also what shares this machinery: filling a resident prefix, gathering rows.  All hits of a request
are pinned before anything is evicted, and stay so until the request ends; misses that find no slot
pass through the transient area.  So a set larger than the segment costs reads and never loses what
was there ("below one token's working set LRU hits exactly 0 %").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

import numpy as np

from .._core import Request
from ..cache.arena import Arena
from .advice import MAX_EXTENT, Adviser, distinct
from .arriving import Arriving
from .demand import Demand
from .fetch import Fetcher
from .frames import FrameSource
from .planner import Curve, Extents, Paces, SweepPlan, pick_seconds, sweep_seconds
from .state import PlaneState
from .taking import Taken, Taker, end_placed, take_slowly


class Picker(Adviser):
    """Reads into and around segments; the store owns the steps, the clock and the leases."""

    def __init__(self, fetcher: Fetcher, demand: Demand, curve: Curve):
        super().__init__(fetcher, demand)
        self._curve, self._taker = curve, Taker()
        self.paces = Paces()
        self.n_looks = 0  # at what planes cost and how long they took, so far

    # ------------------------------------------------------------------------------------- pick

    def pick(
        self, state: PlaneState, ids: np.ndarray, clock: int, admit: bool = True, unit: int = 0
    ) -> Iterator[np.ndarray]:
        """Yield `ids` in parts that are in the address table until the next one is asked for; the
        first, which may be empty, when all reads that have room are under way.

        Items ascend.  Where `ids` are whole units of so many items (experts), only those of a unit
        do: units that are in memory come first, to be used while the others are read, then those
        that advice has asked for.
        Without `admit` nothing is evicted or remembered; misses take free slots or pass through.
        """
        segment, source = state.segment, state.source
        if state.prefetch is not None:
            self.settle(state, clock, wait=not unit)
        n_ready, n_coming, lost = 0, 0, False
        if unit:
            ids, n_ready, n_coming = _ready_first(state, ids, unit)
        frame_of, taken = self._take(state, ids, clock, admit, unit)
        missing, targets = taken.missing, taken.targets
        try:
            if not len(missing) and not n_coming:
                yield ids
                return
            is_lent = targets == 0 if len(taken.placed) else None
            extents = self.extents(state, missing)
            n_bytes = extents.n_bytes
            self.stats.bundles_read += source.bundles_in(n_bytes)
            waited, at = self.stats.wait_ns, 0
            with closing(self._demand.bring(source, extents, targets)) as arriving:
                for a, b in arriving:
                    if b == 0 and n_coming:
                        yield ids[:n_ready]
                        at = n_ready + n_coming
                        lost = not self.settle(state, clock)
                        if lost:
                            break
                        coming = segment.frame_slot[distinct(frame_of[n_ready:at])]
                        segment.pin(coming)
                        taken.hits = np.concatenate((taken.hits, coming))
                        state.prefetched[coming] = False
                        yield ids[n_ready:at]
                        continue
                    arrived = missing[a:b]
                    lent = arrived if is_lent is None else arrived[is_lent[a:b]]
                    segment.show(arrived, targets[a:b], lent)
                    stop = len(ids)
                    if len(missing) == stop:  # nothing else was asked for
                        stop = b
                    elif b < len(missing):
                        rest = n_ready + n_coming
                        stop = rest + int(np.searchsorted(frame_of[rest:], missing[b]))
                    yield ids[at:stop]
                    at = stop
                    segment.take_back()
            self._note_picked(state, clock, extents, n_bytes, self.stats.wait_ns - waited)
        finally:
            segment.take_back()
            self._taker.end(state, taken)
        if lost:  # what was advised could not be read: it is asked for again, and then it counts
            yield from self.pick(state, np.sort(ids[n_ready:]), clock, admit, unit)

    def arriving(
        self, state: PlaneState, ids: np.ndarray, clock: int, admit: bool,
        ended: Callable[[], None],
    ) -> Arriving:  # fmt: skip
        """`pick` for kernels that take the parts natively, of a plane that `arrives`; `ended` when
        it is over."""
        source, stats = state.source, self.stats
        if admit and state.due(clock):
            self._price(state, distinct(ids // source.per_frame), clock)
        request, (n_absent, absent_bytes, unused_bytes) = self._taker.request(
            state, ids, clock, admit=admit, max_extent=MAX_EXTENT, max_frames=state.most_frames
        )
        stats.misses += n_absent
        stats.hits += len(ids) - n_absent
        stats.bytes_useful += absent_bytes
        stats.prefetch_unused_bytes += unused_bytes
        try:
            return self._demand.arriving(
                source, ids, request, state.tables.addresses,
                partial(self._arrived, state, request, clock, ended),
            )  # fmt: skip
        except BaseException:
            self._taker.end_request(state, request)
            raise

    def _arrived(
        self, state: PlaneState, request: Request, clock: int, ended: Callable[[], None],
        n_reads: int, n_bytes: int, waited: int,
    ) -> None:  # fmt: skip
        if n_reads:
            self.stats.bundles_read += state.source.bundles_in(n_bytes)
            if n_reads == len(request) and state.due(clock):
                self._note_picked(state, clock, extents_of(request), n_bytes, waited)
        self._taker.end_request(state, request)
        ended()

    def _take(
        self, state: PlaneState, ids: np.ndarray, clock: int, admit: bool, unit: int = 0
    ) -> tuple[np.ndarray, Taken]:
        """The frames of `ids`, one for each, and what the request holds of them; counted."""
        source = state.source
        frame_of = ids if source.per_frame == 1 else ids // source.per_frame
        frames = frame_of if source.per_frame == 1 else distinct(frame_of)
        if frames is not frame_of:
            self.count_wanted(state, frame_of)
        if admit:
            self._price(state, np.sort(frames) if unit else frames, clock)
        take = take_slowly if unit else self._taker.take
        taken = take(state, frames, clock, admit=admit)
        if frames is frame_of:
            self._count(source, len(frames), taken.missing)
        self.stats.prefetch_unused_bytes += taken.unused_bytes
        return frame_of, taken

    def _note_picked(
        self, state: PlaneState, clock: int, extents: Extents, n_bytes: int, waited_ns: int
    ) -> None:
        if state.due(clock):
            self.n_looks += 1
            self.paces.picks.note(
                n_ops=len(extents), n_bytes=n_bytes,
                estimated_s=pick_seconds(extents, self._curve), waited_s=1e-9 * waited_ns,
            )  # fmt: skip

    def look(self, state: PlaneState, ids: np.ndarray) -> Iterator[np.ndarray]:
        """As `pick`, and nothing of it is kept, counted or remembered; misses pass through."""
        segment = state.segment
        self.settle(state, 0)
        frame_of = ids // state.source.per_frame
        frames = distinct(frame_of)
        missing = frames[segment.addresses[frames] == 0]
        targets = np.zeros(len(missing), dtype=np.uint64)
        try:
            at, extents = 0, self.extents(state, missing)
            with closing(self._demand.bring(state.source, extents, targets)) as arriving:
                for a, b in arriving:
                    segment.lend(missing[a:b], targets[a:b])
                    stop = len(ids)
                    if b < len(missing):
                        stop = int(np.searchsorted(frame_of, missing[b]))
                    yield ids[at:stop]
                    at = stop
                    segment.take_back()
        finally:
            segment.take_back()

    def count_wanted(self, state: PlaneState, frame_of: np.ndarray) -> None:
        """Hits and misses, and the share of the bytes to be read that is asked for."""
        absent = state.segment.frame_slot[frame_of] < 0
        self._count(state.source, len(frame_of), frame_of[absent])

    def _count(self, source: FrameSource, n: int, missing: np.ndarray) -> None:
        """`n` items were wanted, those in the frames `missing` are to be read."""
        self.stats.misses += len(missing)
        self.stats.hits += n - len(missing)
        if len(missing):
            self.stats.bytes_useful += source.tables.n_bytes(missing) // source.per_frame

    def note_wanted(self, state: PlaneState, frames: np.ndarray, clock: int) -> None:
        """A decode step that sweeps wanted these frames, int32 ascending."""
        self._price(state, frames, clock)
        state.last_use[frames] = clock

    def _price(self, state: PlaneState, frames: np.ndarray, clock: int) -> None:
        if len(frames) and state.due(clock):
            self.n_looks += 1
            state.price(frames, self._curve, self.paces, self.extents)

    def note_swept(self, sweep: SweepPlan, waited_ns: int) -> None:
        """The sweep of a sparse plane was waited for so long."""
        self.n_looks += 1
        self.paces.sweeps.note(
            n_ops=len(sweep), n_bytes=sweep.n_bytes,
            estimated_s=sweep_seconds(sweep.n_bytes, self._curve), waited_s=1e-9 * waited_ns,
        )  # fmt: skip

    # ----------------------------------------------------------------------------------- prefix

    def fill_prefix(self, state: PlaneState, clock: int) -> Iterator[int]:
        """Make the first n_slots frames the resident ones; yields frames read, as they arrive."""
        segment = state.segment
        if state.sparse:
            self.settle(state, clock)
            beyond = np.flatnonzero(segment.slot_frame >= segment.n_slots).astype(np.int32)
            self.stats.prefetch_unused_bytes += state.evict(beyond)
        missing = np.flatnonzero(segment.frame_slot[: segment.n_slots] < 0).astype(np.int32)
        if not len(missing):
            return
        placed = segment.place(missing)
        state.residency_changed()
        try:
            targets = segment.slot_address[placed]
            extents = self._demand.extents(
                state.source, missing, max_gap=0, max_extent=MAX_EXTENT
            )
            with closing(self._demand.bring(state.source, extents, targets)) as arriving:
                for a, b in arriving:
                    segment.publish(placed[a:b])
                    if b > a:
                        yield b - a
            if state.policy is not None:
                state.policy.admit(placed, missing, clock)
        finally:
            end_placed(state, placed)

    # ------------------------------------------------------------------------------------- rows

    def gather(self, state: PlaneState, ids: np.ndarray, out: np.ndarray, arena: Arena) -> None:
        """Copy items into uint8 out [n, stride]; absent frames pass through the transient area."""
        source, addresses = state.source, state.segment.addresses
        stride, per_frame = source.plane.stride, source.per_frame
        if len(ids) == 1 and (address := int(addresses[int(ids[0]) // per_frame])):
            out[0] = arena.view(address + int(ids[0]) % per_frame * stride, stride)
            return
        frame_of = np.asarray(ids) // per_frame
        by_frame = np.argsort(frame_of, kind="stable")
        frames, starts = np.unique(frame_of[by_frame], return_index=True)
        frames = frames.astype(np.int32)
        rows = np.split(by_frame, starts[1:])  # positions in `ids`, per distinct frame

        def copy(k: int, address: int) -> None:
            for i in rows[k].tolist():
                at = address + int(ids[i]) % per_frame * stride
                out[i] = arena.view(at, stride)

        absent = np.flatnonzero(addresses[frames] == 0)
        for k in np.flatnonzero(addresses[frames]).tolist():
            copy(k, int(addresses[frames[k]]))
        if not len(absent):
            return
        missing = frames[absent]
        self.stats.bytes_useful += source.tables.n_bytes(missing)
        targets = np.zeros(len(missing), dtype=np.uint64)
        with closing(
            self._demand.bring(source, self.extents(state, missing), targets)
        ) as arriving:
            for a, b in arriving:
                for k in range(a, b):
                    copy(int(absent[k]), int(targets[k]))


def extents_of(request: Request) -> Extents:
    """What a request's `frames` are."""
    frames, first, offset, length = request.frames()
    return Extents(
        np.array(frames, np.int32), np.array(first, np.int32), np.array(offset, np.int64),
        np.array(length, np.int64),
    )  # fmt: skip


def _ready_first(
    state: PlaneState, ids: np.ndarray, unit: int
) -> tuple[np.ndarray, int, int]:
    """`ids` with the units that are in memory first, then those on their way there by advice, then
    the others; and how many items the first two have."""
    segment, units = state.segment, ids.reshape(-1, unit)
    frames = units // state.source.per_frame
    ready = (segment.addresses[frames] != 0).all(axis=1)
    if state.prefetch is None:
        return np.concatenate((units[ready], units[~ready])).ravel(), unit * int(ready.sum()), 0
    coming = (segment.frame_slot[frames] >= 0).all(axis=1) & ~ready
    parts = units[ready], units[coming], units[~(ready | coming)]
    return np.concatenate(parts).ravel(), parts[0].size, parts[1].size
