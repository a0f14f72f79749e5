"""The stream: read-ahead for everything whose order is known.

A program is the list of plane sweeps that the steps to come will make, in order; each sweep is cut
into chunks of at most one stage (planner.SweepPlan).  A ring of stages holds chunks in program
order; a stage that becomes free is given the next chunk at once, across planes and across steps.
When the caller leaves the program, the stages that still match it are kept and the others are
dropped and counted; memory is reused only after its read has ended.

One thread uses a Stream.  It knows sweeps, stages and fetches; not residency, leases or modes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from .._core import RunRead, end_runs, runs_arrived
from ..errors import ChecksumError, CodecError, FlashReadError
from .fetch import Fetch, Fetcher
from .frames import spaced
from .planner import SweepPlan
from .stats import StepStats

_FOREVER = 1 << 62


class Stage(RunRead):
    """Room for one chunk: `address`, where it is read, and where it is decoded if it is coded.

    A chunk that is a run is read by the stage itself, natively and many at a time: a GiB has a
    thousand.  Any other is its `fetch`.
    """

    __slots__ = ("decoded_address", "fetch", "plan", "chunk", "step", "failed")

    def __init__(self, _address: int, decoded_address: int):
        self.decoded_address = decoded_address
        self.fetch: Fetch | None = None
        self.plan: SweepPlan | None = None
        self.chunk = 0
        self.step = 0  # in which it was submitted
        self.failed = False

    def has_arrived(self) -> bool:
        """Whether its frames can be used; never blocks."""
        return self.arrived() if self.fetch is None else self.fetch.arrived()

    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 frames, and uint64 addresses of them."""
        if self.fetch is not None:
            return self.fetch.extents.frames, self.fetch.addresses
        offsets = self.plan.owner.plane.offsets[self.start : self.stop]
        frames = np.arange(self.start, self.stop, dtype=np.int32)
        return frames, offsets + np.uint64(self.shift)  # wraps back

    @property
    def n_bytes(self) -> int:
        """Of the file."""
        if self.fetch is not None:
            return self.fetch.extents.n_bytes
        return int(self.plan.runs[self.chunk, 3])


class Stream:
    """A ring of stages following a program."""

    def __init__(self, fetcher: Fetcher, stages: Sequence[Stage]):
        self._fetcher = fetcher
        self._stages = list(stages)
        self._free: list[Stage] = list(stages)
        self._pending: list[Stage] = []  # submitted, in program order
        self._taken: list[Stage] = []  # with the caller
        self._dropped: list[Stage] = []  # left, perhaps still being read into
        self._program: list[SweepPlan] = []
        self._step = 0  # programs followed so far
        self._visit = self._chunk = 0  # the next chunk the caller will take
        self._next_visit = self._next_chunk = 0  # the next chunk to submit
        self.stats = StepStats()  # the store puts each step's here

    @property
    def n_stages(self) -> int:
        return len(self._stages)

    # ---------------------------------------------------------------------------------- program

    def follow(self, program: Sequence[SweepPlan]) -> None:
        """Read ahead along this program from now on; what matches it already is kept."""
        if self._taken or self._n_listed() != self.n_stages:  # interrupted between two lists
            self.reset()
        while self._dropped:
            self._reclaim(self._dropped[0])
        self._program = [plan for plan in program if len(plan)]
        self._visit = self._chunk = 0
        self._step += 1
        self._match()

    def enter(self, plan: SweepPlan) -> None:
        """The caller starts sweeping `plan`, skipping what the program had before it, or
        leaving the program for it when it is not there at all."""
        if len(plan) and not self._stages:
            raise AssertionError(f"{plan.owner.name} streams and the ring has no stages")
        self._chunk = 0
        if len(plan) == 0 or (
            self._visit < len(self._program) and self._program[self._visit] is plan
        ):
            return
        rest = self._program[self._visit :]
        after = next((i for i, other in enumerate(rest) if other is plan), -1)
        self._program = [plan, *rest[after + 1 :]]
        self._visit = 0
        self._match()

    def leave(self, plan: SweepPlan) -> None:
        """The caller is done with `plan`, at its end or before."""
        self.release()
        if len(plan) == 0:
            return
        complete = self._chunk == len(plan)
        self._visit, self._chunk = self._visit + 1, 0
        if not complete:
            self._match()

    # ----------------------------------------------------------------------------------- stages

    def take(self, most: int) -> list[Stage]:
        """The next chunks of the entered sweep: waits for one, adds up to `most - 1` that have
        arrived.  They stay the caller's until `release`.  Raises what Fetch.wait raises."""
        plan = self._program[self._visit]
        if not self._pending:  # every stage was dropped with its read in flight
            self._fill(wait=True)
        first = self._pending[0]
        if first.plan is not plan or first.chunk != self._chunk:
            raise AssertionError(
                f"the ring holds chunk {first.chunk} of another sweep, not chunk {self._chunk}"
            )
        most = min(most, len(self._pending), len(plan) - self._chunk)
        n = runs_arrived(self._pending, most)
        if n == 0 and not first.has_arrived():
            start = time.perf_counter_ns()
            try:
                self._wait(first)
            finally:
                self.stats.wait_ns += time.perf_counter_ns() - start
            n = runs_arrived(self._pending, most)
        n = max(n, 1)
        while n < most and self._pending[n].has_arrived():
            n += 1
        # An interrupt between two lists leaves a stage in none: `follow` sees that, and resets.
        taken = self._pending[:n]
        del self._pending[:n]
        self._taken = taken
        self._chunk += n
        return self._taken

    def _wait(self, stage: Stage) -> None:
        try:
            self._wait_once(stage)
        except (FlashReadError, ChecksumError, CodecError):
            if stage.step == self._step:
                raise
            # Read ahead by an earlier step: this one has not asked for it yet, and asks now.
            self._close(stage)
            self._submit([stage])
            self._wait_once(stage)

    def _wait_once(self, stage: Stage) -> None:
        try:
            if stage.fetch is not None:
                stage.fetch.wait()
            else:
                self._fetcher.wait_run(stage.plan.owner, stage)
        except Exception:
            stage.failed = True
            raise

    def release(self) -> None:
        """The taken stages are free again and get the next chunks of the program."""
        taken, self._taken = self._taken, []
        end_runs(taken)
        for stage in taken:
            if stage.fetch is not None:
                self._close(stage)
        self._free += taken
        self._fill()

    def _close(self, stage: Stage) -> None:
        end_runs([stage])
        if stage.fetch is not None:
            stage.fetch.close()
            self.stats.decode_ns += stage.fetch.decode_ns
            self.stats.decode_wait_ns += stage.fetch.decode_wait_ns
            stage.fetch = None
        stage.failed = False

    def _match(self) -> None:
        """Keep the pending stages that the program asks for, in order; drop the others."""
        asked = self._chunks(self._visit, self._chunk)
        kept: list[Stage] = []
        wanted = next(asked, None)
        for stage in self._pending:
            same = wanted is not None and (stage.plan, stage.chunk) == wanted[2:]
            if same and not stage.failed:
                kept.append(stage)
                wanted = next(asked, None)
            else:
                self.stats.bytes_dropped += stage.n_bytes
                self._dropped.append(stage)
        self._pending = kept
        if wanted is None:
            self._next_visit, self._next_chunk = len(self._program), 0
        else:
            self._next_visit, self._next_chunk = wanted[:2]
        self._fill()

    def _chunks(self, visit: int, chunk: int) -> Iterator[tuple[int, int, SweepPlan, int]]:
        for v in range(visit, len(self._program)):
            plan = self._program[v]
            for c in range(chunk if v == visit else 0, len(plan)):
                yield v, c, plan, c

    def _fill(self, *, wait: bool = False) -> None:
        """Give free stages the next chunks; `wait` for dropped ones when there is no other."""
        for stage in [s for s in self._dropped if s.has_arrived()]:
            self._reclaim(stage)
        if wait and not self._free and not self._pending and self._dropped:
            self._reclaim(self._dropped[0])
        while self._free and self._next_visit < len(self._program):
            plan = self._program[self._next_visit]
            n = 1 if self._native(plan) is None else len(plan) - self._next_chunk
            stages = self._free[-n:]
            for chunk, stage in enumerate(stages, self._next_chunk):
                stage.plan, stage.chunk = plan, chunk
            del self._free[-n:]
            try:
                self._submit(stages)
            except BaseException:
                for stage in stages:
                    self._close(stage)
                self._free += stages
                raise
            self._pending += stages
            self._next_chunk += len(stages)
            if self._next_chunk == len(plan):
                self._next_visit, self._next_chunk = self._next_visit + 1, 0

    def _reclaim(self, stage: Stage) -> None:
        self._close(stage)
        self._free.append(stage)
        self._dropped.remove(stage)

    def _native(self, plan: SweepPlan) -> np.ndarray | None:
        """Its runs, where the storage reads runs."""
        return plan.runs if self._fetcher.brings else None

    def _submit(self, stages: list[Stage]) -> None:
        """Begin the chunks of these stages, which follow one another; one that is no run alone."""
        first = stages[0]
        source, runs = first.plan.owner, self._native(first.plan)
        for stage in stages:
            stage.step = self._step
        if runs is not None:
            self.stats.bytes_read += self._fetcher.start_runs(source, runs, first.chunk, stages)
            self.stats.reads += len(stages)
            return
        frames = first.plan.frames(first.chunk)
        extents = source.extents(frames, max_gap=0, max_extent=_FOREVER)
        targets = None
        if source.coded:
            targets = spaced(first.decoded_address, source.slot_bytes, len(frames))
        self.stats.bytes_read += extents.n_bytes
        self.stats.reads += len(extents)
        first.fetch = self._fetcher.start(
            source, extents, targets=targets, raw_address=first.address, ahead=True
        )

    # ----------------------------------------------------------------------------------- upkeep

    def reset(self) -> None:
        """Wait for everything and forget the program; every stage is free afterwards."""
        self._program, self._visit, self._chunk = [], 0, 0
        self._next_visit, self._next_chunk = 0, 0
        self.stats.bytes_dropped += sum(stage.n_bytes for stage in self._pending)
        for stage in self._stages:
            self._close(stage)
        for some in (self._pending, self._taken, self._dropped):
            some.clear()
        self._free = list(self._stages)

    def use(self, stages: Sequence[Stage]) -> None:
        """These stages make up the ring from now on; reads into the old ones have ended."""
        self.reset()
        self._stages = list(stages)
        self._free = list(stages)

    def _n_listed(self) -> int:
        return len(self._free) + len(self._pending) + len(self._taken) + len(self._dropped)

    def check(self) -> None:
        """Every stage is in exactly one list; pending stages are what the program asks next."""
        lists = (self._free, self._pending, self._taken, self._dropped)
        stages = [id(stage) for some in lists for stage in some]
        if len(stages) != self.n_stages or len(set(stages)) != self.n_stages:
            raise AssertionError(
                f"{self.n_stages} stages, lists hold {[len(some) for some in lists]}"
            )
        asked = self._chunks(self._visit, self._chunk)
        for i, stage in enumerate(self._pending):
            wanted = next(asked, None)
            if wanted is None or (stage.plan, stage.chunk) != wanted[2:]:
                raise AssertionError(f"pending stage {i} holds chunk {stage.chunk} out of order")
        wanted = next(asked, None)
        after = (len(self._program), 0) if wanted is None else wanted[:2]
        if after != (self._next_visit, self._next_chunk):
            raise AssertionError(
                f"the next chunk to read is {(self._next_visit, self._next_chunk)}, "
                f"after the pending ones comes {after}"
            )
        if any(stage.begun or stage.fetch is not None for stage in self._free):
            raise AssertionError("a free stage is being read into")
