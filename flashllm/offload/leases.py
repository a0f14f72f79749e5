"""The iterators of leases over one plane: what is in memory first, the rest as it arrives.

Each is closed by the store, at the latest when its step ends; one that was begun and has not run to
its end is `unfinished`, and then segments may have to be repaired.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from .._core import lend_runs
from .advice import distinct
from .arriving import Arriving
from .pick import Picker
from .state import PlaneState
from .stats import StepStats
from .stream import Stream


@dataclass(slots=True)
class Lease:
    """Items that may be read now: [start, stop) of the plane or, when `ids` is given, those items.

    addresses  uint64[n_frames] by frame number; valid for the frames of this lease only
    """

    start: int
    stop: int
    addresses: np.ndarray
    ids: np.ndarray | None = None


class Leases:
    """Walks over planes, made of a picker's answers and of what a stream brings."""

    def __init__(self, picker: Picker, stream: Stream):
        self._picker, self._stream = picker, stream
        self.unfinished = 0
        self.stats = StepStats()  # the store puts each step's here

    def scan(self, state: PlaneState) -> Iterator[Lease]:
        """All items of a plane, ascending."""
        self.stats.bytes_useful += state.sweep().absent_bytes
        self.stats.bundles_read += state.source.bundles_in(state.sweep().n_bytes)
        source, addresses = state.source, state.segment.addresses
        per_frame, n_items = source.per_frame, source.n_items
        with closing(self._frames(state)) as swept:
            for start, stop in swept:
                yield Lease(start * per_frame, min(stop * per_frame, n_items), addresses)

    def audited(self, state: PlaneState, ids: np.ndarray) -> Iterator[Lease]:
        """Chosen items as an extra look: nothing of it stays, and its bytes are counted apart."""
        step, addresses, n_items = self.stats, state.segment.addresses, state.source.n_items
        before = step.bytes_read
        self.unfinished += 1
        with closing(self._picker.look(state, ids)) as looked:
            for some in looked:
                if len(some):
                    yield Lease(0, n_items, addresses, some)
        self.unfinished -= 1
        step.audit_bytes += step.bytes_read - before
        step.bytes_read = before

    def picked(
        self, state: PlaneState, ids: np.ndarray, *, clock: int, admit: bool, unit: int = 0
    ) -> Iterator[Lease]:
        """Chosen items, of which only the frames that are absent are read."""
        addresses, n_items = state.segment.addresses, state.source.n_items
        self.unfinished += 1
        self.stats.planes_picked += 1
        with closing(self._picker.pick(state, ids, clock, admit, unit)) as picked:
            for some in picked:
                if len(some):
                    yield Lease(0, n_items, addresses, some)
        self.unfinished -= 1

    def arriving(
        self, state: PlaneState, ids: np.ndarray, *, clock: int, admit: bool
    ) -> Arriving | None:
        """`picked`, for kernels that take leases natively; None where it takes an iterator."""
        if not state.arrives or state.prefetch is not None:
            return None

        def ended() -> None:
            self.unfinished -= 1

        self.unfinished += 1
        self.stats.planes_picked += 1
        return self._picker.arriving(state, ids, clock, admit, ended)

    def swept(
        self, state: PlaneState, ids: np.ndarray, *, clock: int, admit: bool
    ) -> Iterator[Lease]:
        """Chosen items out of all that is absent, streaming by."""
        addresses, n_items = state.segment.addresses, state.source.n_items
        frames = ids if state.source.per_frame == 1 else ids // state.source.per_frame
        self._picker.count_wanted(state, frames)
        if admit:
            self._picker.note_wanted(state, distinct(frames), clock)
        sweep, waited = state.sweep(), self.stats.wait_ns
        self.stats.planes_swept += len(sweep) > 0
        self.stats.bundles_read += state.source.bundles_in(sweep.n_bytes)
        at = 0
        with closing(self._frames(state)) as swept:
            for _, frame_stop in swept:
                stop = at + int(np.searchsorted(frames[at:], frame_stop))
                if stop > at:
                    yield Lease(0, n_items, addresses, ids[at:stop])
                    at = stop
        if admit and state.due(clock):
            self._picker.note_swept(sweep, self.stats.wait_ns - waited)

    def _frames(self, state: PlaneState) -> Iterator[tuple[int, int]]:
        """(start, stop): these frames are in the address table now, until the next step of the
        iterator; ascending, covering the plane."""
        sweep, segment, stream = state.sweep(), state.segment, self._stream
        addresses = segment.addresses
        most = max(1, stream.n_stages // 2)  # the other half keeps the device busy
        no_gaps = sweep.n_bytes == sweep.absent_bytes  # else some that is read is resident
        self.unfinished += 1
        stream.enter(sweep)
        try:
            start = 0
            if stop := int(sweep.cover[0]):
                yield start, stop
                start = stop
            chunk = 0
            while chunk < len(sweep):
                stages = stream.take(most)
                if no_gaps and stages[0].fetch is None:
                    segment.note_lent(lend_runs(stages, addresses))
                else:
                    for stage in stages:
                        frames, places = stage.frames()
                        absent = addresses[frames] == 0
                        segment.lend(frames[absent], places[absent])
                chunk += len(stages)
                stop = int(sweep.cover[chunk])
                yield start, stop
                start = stop
                segment.take_back()
                stream.release()
        finally:
            segment.take_back()
            stream.leave(sweep)
        self.unfinished -= 1
