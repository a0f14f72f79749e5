"""Fetching: extents read, verified and decoded into given memory, in the background.

`Fetcher.start` submits all extents of a plan at once; `Fetch.wait` gives them back in order.
Frames of a `raw` plane are read straight to their targets.  Coded frames are read to a raw area and
decoded from there by worker threads, one decoder each, as their extents arrive.  Memory belongs to
the caller and must stay until `Fetch.close()`.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from .._core import Bring, ReadFailure, Request, RunRead
from ..cache.arena import Arena
from ..container.base import Plane
from ..errors import CodecError, FlashReadError, UnsupportedError
from ..units import KIB
from .arriving import Arriving
from .frames import RAW, FrameSource, linear_batch
from .planner import Extents, Part

# Extents are decoded in groups: waking a thread costs about as much as decoding 50 KiB.
DECODE_GROUP_BYTES = 256 * KIB
_NONE = np.empty(0, dtype=np.uint64)


class _DecodeJob:
    """Extents [start, stop) of a coded fetch: wait for them, decode their frames."""

    __slots__ = ("fetch", "start", "stop", "ready", "error", "ns")

    def __init__(self, fetch: Fetch, start: int, stop: int):
        self.fetch, self.start, self.stop = fetch, start, stop
        self.ready = threading.Event()
        self.error: BaseException | None = None
        self.ns = 0


class Fetch:
    """Frames of one plane on their way.  Used by one thread; decoding happens in others.

    Holds a lease of the arena until it is closed; deleting it closes it.
    """

    __slots__ = (
        "source", "extents", "addresses", "failed", "decode_wait_ns", "_ticket", "_jobs", "_places",
        "_cancelled", "_closed", "_arena", "_pid",
    )  # fmt: skip

    def __init__(
        self, source: FrameSource, extents: Extents | Part, addresses: np.ndarray, arena: Arena
    ):
        self.source, self.extents, self.addresses = source, extents, addresses
        self.failed = False
        self.decode_wait_ns = 0  # that the caller stood still for decoding, all bytes being there
        self._ticket = None
        self._jobs: list[_DecodeJob] = []
        self._places: np.ndarray = _NONE
        self._cancelled = self._closed = False
        self._arena, self._pid = arena, os.getpid()
        arena.lease()

    def wait(self, upto: int | None = None) -> None:
        """Return when extents [0, upto) (default: all) can be used.

        Raises FlashReadError, ChecksumError or CodecError naming plane, frame and items; the
        fetch is then failed and is good for nothing but close().
        """
        upto = len(self.extents) if upto is None else upto
        try:
            self._ticket.wait(upto)
            if not self._jobs:
                return
            start = time.perf_counter_ns()
            for job in self._jobs:
                if job.start >= upto:
                    break
                job.ready.wait()
                if job.error is not None:
                    raise job.error
            self.decode_wait_ns += time.perf_counter_ns() - start
        except Exception:
            self.failed = True
            raise

    def done(self) -> int:
        """How many extents, from the first, can be used now; never blocks."""
        if not self._jobs:
            return self._ticket.done()
        n = 0
        for job in self._jobs:
            if not job.ready.is_set() or job.error is not None:
                break
            n = job.stop
        return n

    @property
    def decode_ns(self) -> int:
        """Thread time spent decoding so far."""
        return sum(job.ns for job in self._jobs)

    def close(self) -> None:
        """Wait until nothing writes to the memory any more; idempotent."""
        if self._closed:
            return
        if os.getpid() != self._pid:  # forked: the threads that would end this stayed behind
            self._closed = True
            return
        self._cancelled = True
        if self._ticket is not None:
            self._ticket.close()
        for job in self._jobs:
            job.ready.wait()
        self._closed = True
        self._arena.release()

    def __del__(self) -> None:
        self.close()

    def arrived(self) -> bool:
        """Whether all of them can be."""
        return self.done() == len(self.extents)

    def _describe(self, extent: int, check: int) -> str:
        """Which frame a failed extent is about; `check` counts within the extent, -1 = none."""
        return self.source.describe(self.extents.frame_at(extent, max(check, 0)))


class Fetcher:
    """Starts fetches on one storage; owns the decoding threads (none without coded planes)."""

    def __init__(
        self, storage, arena: Arena, *, path: object, codecs, planes: list[Plane], n_threads: int,
        alignment: int, trash: int,
    ):  # fmt: skip
        for needed in (storage.alignment, getattr(storage, "memory_alignment", 1)):
            if alignment % needed:
                raise UnsupportedError(
                    f"{path}: frames are aligned to {alignment} bytes, the {storage.name!r} "
                    f"backend needs {needed} here"
                )
        self._storage, self._arena, self._path, self._trash = storage, arena, str(path), trash
        names = sorted({plane.codec for plane in planes} - {RAW})
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        wanted = [
            threading.Thread(
                target=_decode_forever,
                # One decoder per thread and codec: decoders hold native state.
                args=(self._jobs, {name: codecs[name].decoder() for name in names}, arena,
                      self._path),
                name=f"flashllm-decode-{i}",
                daemon=True,  # a handle that is never closed must not keep the interpreter alive
            )
            for i in range(max(n_threads, 1) if names else 0)
        ]  # fmt: skip
        self._threads: list[threading.Thread] = []
        for thread in wanted:
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more threads for us: fewer will do
                if not self._threads:
                    where = "starting a decoding thread"
                    raise FlashReadError(errno.EAGAIN, str(error), path, 0, where) from None
                break
            self._threads.append(thread)

    def start(
        self,
        source: FrameSource,
        extents: Extents,
        *,
        targets: np.ndarray | None = None,
        raw_address: int = 0,
        ahead: bool = False,
    ) -> Fetch:
        """Submit all extents, read one after the other from `raw_address` on.

        targets  of a coded plane, uint64[m]: where each frame is wanted, decoded.  Raw frames stay
                 where they are read.
        ahead    before somebody waits for them: others go first (storage/base.py)
        """
        batch, places = linear_batch(extents, source, raw_address)
        if not source.coded:
            targets = places
        fetch = Fetch(source, extents, targets, self._arena)
        try:
            fetch._ticket = self._storage.submit(batch, fetch._describe, ahead=ahead)
            if source.coded:
                fetch._places = places
                self._queue_jobs(fetch)
        except BaseException:  # a traceback would keep it, and with it the arena's lease, alive
            fetch.close()
            raise
        return fetch

    def start_frames(
        self, source: FrameSource, extents: Extents, start: int, stop: int, targets: np.ndarray, *,
        room: int = 0, room_bytes: int = 0, ahead: bool = False,
    ) -> Fetch:  # fmt: skip
        """Submit the extents [start, stop) of raw frames, each read to its address in `targets`
        uint64[m]; one of 0 is filled in: a place in the `room_bytes` from `room` on."""
        fetch = Fetch(source, Part(extents, start, stop), targets, self._arena)
        try:
            fetch._ticket = self._storage.submit_frames(
                extents, start, stop, source.tables, targets, room=room, room_bytes=room_bytes,
                step=source.slot_bytes, trash=self._trash, describe=fetch._describe, ahead=ahead,
            )  # fmt: skip
        except BaseException:  # as in `start`
            fetch.close()
            raise
        return fetch

    @property
    def brings(self) -> bool:
        """Whether the storage has `bring` and reads runs."""
        return self._storage.brings

    def bring(
        self, source: FrameSource, ids: np.ndarray, request: Request, addresses: np.ndarray,
        halves: tuple[int, int], half_bytes: int, ended: Callable[[Bring], None],
    ) -> Arriving:  # fmt: skip
        """Raw frames for the items `ids`, as `start_frames` of all extents, wave by wave."""

        def describe(extent: int, check: int) -> str:
            frames, first, *_ = request.frames()
            return source.describe(frames[first[extent] + max(check, 0)])

        storage = self._storage
        native = storage.bring(
            request, halves=halves, half_bytes=half_bytes, step=source.slot_bytes,
            trash=self._trash, describe=describe,
        )  # fmt: skip
        return Arriving(
            ids, addresses, native, self._arena, worded=partial(storage.worded, describe=describe),
            ended=ended,
        )  # fmt: skip

    def start_runs(
        self, source: FrameSource, runs: np.ndarray, first: int, stages: list[RunRead]
    ) -> int:
        """Submit, ahead, rows of `runs` as the storage takes them; their bytes."""
        return self._storage.submit_runs(source.tables, runs, first, stages)

    def wait_run(self, source: FrameSource, run: RunRead) -> None:
        """As Fetch.wait, of a run."""
        try:
            run.wait()
        except ReadFailure as failure:
            start = run.start
            raise self._storage.worded(
                failure, lambda _, check: source.describe(start + max(check, 0))
            ) from None

    def _queue_jobs(self, fetch: Fetch) -> None:
        group = np.cumsum(fetch.extents.length) // DECODE_GROUP_BYTES
        ends = [*(np.flatnonzero(np.diff(group)) + 1), len(fetch.extents)]
        start = 0
        for stop in ends:
            job = _DecodeJob(fetch, start, int(stop))
            start = int(stop)
            fetch._jobs.append(job)  # close() waits for jobs: none may be here and not queued
            self._jobs.put(job)

    def close(self) -> None:
        """Stop the threads; every fetch has been closed before."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()


def _decode_forever(jobs: queue.SimpleQueue, decoders: dict, arena: Arena, path: str) -> None:
    """A decoding thread: jobs in the order in which they were queued, until None."""
    while (job := jobs.get()) is not None:
        try:
            job.fetch._ticket.wait(job.stop)
            if not job.fetch._cancelled:
                start = time.perf_counter_ns()
                _decode(job, decoders[job.fetch.source.plane.codec].decode_into, arena, path)
                job.ns = time.perf_counter_ns() - start
        except BaseException as error:  # handed to the thread that waits, which raises it
            job.error = error
        finally:
            job.ready.set()
        del job  # an idle thread keeps no arrays alive


def _decode(job: _DecodeJob, decode_into: Callable, arena: Arena, path: str) -> None:
    fetch = job.fetch
    source, extents = fetch.source, fetch.extents
    first, last = int(extents.first[job.start]), int(extents.first[job.stop])
    stored = source.plane.stored
    for i in range(first, last):
        frame = int(extents.frames[i])
        coded = arena.view(fetch._places[i], int(stored[frame]))
        out = arena.view(fetch.addresses[i], source.frame_bytes)
        try:
            decode_into(coded.data, out.data)
        except CodecError as error:
            where = f"{source.describe(frame)}: {error.where}"
            raise CodecError(path, where, error.expected, error.found) from error
