"""Reading on demand: frames that are wanted now, brought in file order.

`bring` submits reads in waves and yields as they arrive.  Frames with a target (a slot) go there;
the others go to a transient area of two halves, one being consumed while the other is read into.
Coded frames also pass through the area on their way.  Knows nothing of pins, policies or leases.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from .._core import Bring, Request
from ..units import KIB, align_up
from .arriving import Arriving
from .fetch import Fetch, Fetcher
from .frames import MAX_PIECES, FrameSource, spaced
from .planner import Extents
from .stats import StepStats

# Each return to the caller costs a kernel call; waiting for single reads would overlap no better.
RETURNS_PER_WAVE = 4
RETURN_BYTES = 256 * KIB


class Demand:
    """The transient area and the reads that pass through it; one `bring` at a time."""

    def __init__(self, fetcher: Fetcher, address: int, half_bytes: int):
        self._fetcher = fetcher
        self._halves = (address, address + half_bytes)
        self._half_bytes = half_bytes
        self._fetches: deque[tuple[int, Fetch, int]] = deque()
        self._arriving: weakref.ref[Arriving] | None = None
        self.stats = StepStats()  # the store puts each step's here

    def extents(self, source: FrameSource, frames: np.ndarray, *, max_gap: int,
                max_extent: int) -> Extents:  # fmt: skip
        """Reads for these frames, ascending; any single one fits a half of the area."""
        raw_bytes = 0
        if source.coded:
            max_extent = min(max_extent, self._half_bytes // 2)
            raw_bytes = max_extent + source.alignment
        most = self.most_frames(source, raw_bytes)
        return source.extents(frames, max_gap=max_gap, max_extent=max_extent, max_frames=most)

    def most_frames(self, source: FrameSource, raw_bytes: int = 0) -> int:
        """Of one extent, where so much of a half is needed for what is not decoded yet."""
        most = (self._half_bytes - raw_bytes) // source.slot_bytes
        return min(max(most, 1), MAX_PIECES)

    def bring(
        self, source: FrameSource, extents: Extents, targets: np.ndarray
    ) -> Iterator[tuple[int, int]]:
        """Read all extents; yield (a, b): extents.frames[a:b] are at targets[a:b] now.  The first
        is (0, 0): what fits into the area has been submitted.

        targets  uint64[m] addresses; 0 = anywhere, filled in here and valid until the next step
                 of the iterator.  Closing the iterator waits for the reads in flight.
        """
        fetches = self._fetches
        if fetches:
            raise AssertionError("two demands at once")
        waves = self._waves(source, extents, targets)
        n_started = 0
        try:
            for w, (start, stop) in enumerate([(0, 0), *waves]):
                while n_started < min(max(w, 1) + 1, len(waves)):
                    fetches.append(self._start(source, extents, targets, waves, n_started))
                    n_started += 1
                if w == 0:
                    yield 0, 0
                    continue
                at, fetch, n_bytes = fetches[0]
                n = stop - start
                step = -(-n // min(RETURNS_PER_WAVE, n, 1 + n_bytes // RETURN_BYTES))
                done = 0
                while done < n:
                    done = self._wait(fetch, min(n, done + step))
                    upto = int(extents.first[start + done])
                    yield at, upto
                    at = upto
                self._end_first()
        finally:
            self.reset()

    def arriving(
        self, source: FrameSource, ids: np.ndarray, request: Request, addresses: np.ndarray,
        ended: Callable[[int, int, int], None],
    ) -> Arriving:  # fmt: skip
        """`bring` of what these items (int32, ascending) need, natively.

        ended  is called with reads, bytes and nanoseconds waited, when it is over and counted,
               before anything else can be asked for
        """
        if self._fetches:
            raise AssertionError("two demands at once")
        arriving = self._fetcher.bring(
            source, ids, request, addresses, self._halves, self._half_bytes,
            partial(self._arrived, ended),
        )  # fmt: skip
        self._arriving = weakref.ref(arriving)
        return arriving

    def _arrived(self, ended: Callable[[int, int, int], None], native: Bring) -> None:
        stats = self.stats
        n_reads, n_bytes, waited = native.submitted()
        stats.reads += n_reads
        stats.bytes_read += n_bytes
        stats.wait_ns += waited
        ended(n_reads, n_bytes, waited)

    def reset(self) -> None:
        """Wait for the reads in flight; their bytes are lost."""
        while self._fetches:
            self._end_first()
        if self._arriving is not None and (arriving := self._arriving()) is not None:
            arriving.close()
        self._arriving = None

    def _waves(self, source, extents, targets) -> list[tuple[int, int]]:
        """Extents [start, stop) of each wave: as many as a half has transient room for."""
        if not len(extents):
            return []
        if source.coded:  # the raw area starts at a multiple of the alignment
            room = self._half_bytes - source.alignment
            transient = np.add.reduceat((targets == 0).astype(np.int64), extents.first[:-1])
            total = np.cumsum(transient * source.slot_bytes + extents.length)
        else:
            room = self._half_bytes // source.slot_bytes
            n_slots = np.count_nonzero(targets)
            if len(targets) - n_slots <= room:
                return [(0, len(extents))]
            anywhere = np.cumsum(targets == 0) if n_slots else None
            total = extents.first[1:] if anywhere is None else anywhere[extents.first[1:] - 1]
        if int(total[-1]) <= room:
            return [(0, len(extents))]
        waves, start, before = [], 0, 0
        while start < len(extents):
            stop = int(np.searchsorted(total, before + room, side="right"))
            stop = max(stop, start + 1)
            waves.append((start, stop))
            start, before = stop, int(total[stop - 1])
        return waves

    def _start(self, source, extents, targets, waves, w) -> tuple[int, Fetch, int]:
        """Submit wave `w` into its half; (index of its first frame, its fetch, its bytes)."""
        start, stop = waves[w]
        address = self._halves[w % 2]
        if source.coded:
            fetch = self._start_coded(source, extents, targets, start, stop, address)
        else:
            fetch = self._fetcher.start_frames(
                source, extents, start, stop, targets, room=address, room_bytes=self._half_bytes
            )
        n_bytes = fetch.extents.n_bytes
        self.stats.bytes_read += n_bytes
        self.stats.reads += stop - start
        return int(extents.first[start]), fetch, n_bytes

    def _start_coded(self, source, extents, targets, start, stop, address) -> Fetch:
        part = extents.part(start, stop)
        a, b = int(extents.first[start]), int(extents.first[stop])
        anywhere = np.flatnonzero(targets[a:b] == 0)
        targets[a + anywhere] = spaced(address, source.slot_bytes, len(anywhere))
        raw_at = align_up(len(anywhere) * source.slot_bytes, source.alignment)
        if raw_at + part.n_bytes > self._half_bytes:
            raise AssertionError(f"{raw_at} + {part.n_bytes} bytes in {self._half_bytes}")
        return self._fetcher.start(
            source, part, targets=targets[a:b], raw_address=address + raw_at
        )

    def _wait(self, fetch: Fetch, upto: int) -> int:
        """Until so many extents are there; how many are."""
        done = fetch.done()
        if done < upto:
            start = time.perf_counter_ns()
            try:
                fetch.wait(upto)
            finally:
                self.stats.wait_ns += time.perf_counter_ns() - start
            done = fetch.done()
        return done

    def _end_first(self) -> None:
        fetch = self._fetches[0][1]
        fetch.close()
        if fetch.source.coded:
            self.stats.decode_ns += fetch.decode_ns
            self.stats.decode_wait_ns += fetch.decode_wait_ns
        self._fetches.popleft()
