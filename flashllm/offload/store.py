"""WeightStore: what models see of weights.  The only room that knows cache and container.

A model announces the order in which a step walks the planes and then asks: `scan` for a whole
plane, `acquire` for chosen bundles, `gather` for single rows.  It gets leases: a table of addresses
by frame number, and the items that may be touched through it until the iterator advances or is
closed.  Leases come in ascending item order (of units of items: within each) and together cover
each item exactly once, whatever is resident, in whatever mode, after whatever happened before:
exactness never depends on this room's decisions.

Errors of reading and decoding name plane, frame and items; after one, and after an iterator was
dropped half-way, the store is ready for the next step.  One thread uses a store.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from ..cache.policies import POLICIES
from ..cache.policies.belady import Belady
from ..container.base import CODECS
from ..errors import ClosedError, UnknownNameError, UsageError
from .arriving import Arriving
from .demand import Demand
from .fetch import Fetcher
from .leases import Lease, Leases
from .memory import StoreMemory
from .pick import Picker
from .planner import Curve, SweepPlan
from .sizing import (
    DECODE_THREADS,
    DEMAND_BYTES,
    demand_half_bytes,
    routed_planes,
    sparse_planes,
    stage_areas,
)
from .state import PICK_PENALTY, PlaneState, make_states
from .stats import StepStats
from .stream import Stream

MODES = ("adaptive", "sweep", "cached")


class WeightStore:
    """Planes of an open container, read through `storage`, kept in one arena.

    resident        plane name -> frames kept: a fixed prefix of a dense plane; the slots of a
                    sparse one.  Planes not named keep none.
    most            plane name -> the most that `resize` can ask for later (address space, not
                    memory); as `resident` where not named
    curve           device curve (planner.Curve): prices reads
    sparse          planes that `acquire` serves; None: every `….ffn` beside a `….deciding` and
                    every `….experts` beside a `….router`
    policy          eviction policy of sparse planes, with `policy_options`
    ring_stages     read-ahead stages of `stage_bytes`; 0 when nothing that is scanned streams
    ring_reserve    most stages that `resize` can ask for later (address space, not memory)
    demand_bytes    transient area for reads on demand
    decode_threads  threads that decode, if any plane is coded
    mode            "adaptive", or "sweep" or "cached" to hold all sparse planes in one mode
    begin_cached    under "adaptive" sparse planes begin cached, not swept, and stay so where it
                    costs the same: little of them is wanted
    debug           check every invariant at the end of every step
    """

    def __init__(
        self,
        container,
        storage,
        *,
        resident: Mapping[str, int],
        most: Mapping[str, int] | None = None,
        curve: Curve,
        sparse: Collection[str] | None = None,
        policy: str = "lfu",
        policy_options: Mapping | None = None,
        ring_stages: int,
        ring_reserve: int = 0,
        stage_bytes: int,
        demand_bytes: int = DEMAND_BYTES,
        decode_threads: int = DECODE_THREADS,
        mode: str = "adaptive",
        begin_cached: bool = False,
        huge_pages: bool = True,
        debug: bool = False,
    ):
        if mode not in MODES:
            raise UnknownNameError("store mode", mode, list(MODES))
        if POLICIES[policy] is Belady:
            raise UsageError("policy 'belady' needs the future: it serves simulations only")
        most = {**resident, **(most or {})}
        for name in most:
            if name not in container.planes:
                raise UnknownNameError("plane", name, list(container.planes))
        self._clock = 0  # decode steps so far
        self.n_resized = 0  # how often what is kept has changed
        self._n_looks = 0  # of the picker's, before this step
        self._admit = True
        self._adaptive, self._debug = mode == "adaptive", debug
        self._pick_penalty = 1.0 if begin_cached else PICK_PENALTY
        self._closed, self._pid = False, os.getpid()
        self._open: weakref.ref | None = None  # the iterator whose lease may be out
        self._total = StepStats()
        self._memory = StoreMemory(
            container, resident=resident, most=most, stage_bytes=stage_bytes,
            ring_reserve=max(ring_reserve, ring_stages), demand_bytes=demand_bytes,
            huge_pages=huge_pages,
        )  # fmt: skip
        self._arena, self._storage = self._memory.arena, storage
        self._fetcher = Fetcher(
            storage, self._arena, path=container.path, codecs=CODECS,
            planes=list(container.planes.values()), n_threads=decode_threads,
            alignment=container.alignment, trash=self._arena["trash"].address,
        )  # fmt: skip
        self._stream = Stream(self._fetcher, ())
        self._stream.use(self._memory.ring(0, ring_stages))
        half = demand_half_bytes(container, demand_bytes)
        self._demand = Demand(self._fetcher, self._arena["demand"].address, half)
        self._picker = Picker(self._fetcher, self._demand, curve)
        self._leases = Leases(self._picker, self._stream)
        self._count_into(StepStats())
        self._states = make_states(
            container, self._arena, resident=resident, most=most, curve=curve, policy=policy,
            mode="cached" if self._adaptive and begin_cached else mode,
            sparse=sparse_planes(container) if sparse is None else sparse,
            routed=routed_planes(container),
            policy_options=policy_options or {}, stage_areas=stage_areas(container, stage_bytes),
        )  # fmt: skip
        self._sparse = [state for state in self._states.values() if state.sparse]
        for state in self._sparse:
            native = state.tables is not None and self._fetcher.brings
            state.arrives = native and not state.source.coded
            state.most_frames = self._demand.most_frames(state.source)
        self.sparse_names = frozenset(state.name for state in self._sparse)
        # Also at interpreter exit: memory must not go while native threads read into it.
        self._shut_down = weakref.finalize(
            self, _shut_down, self._pid, self._sparse, self._picker, self._demand,
            self._stream, self._fetcher, self._arena,
        )  # fmt: skip

    # --------------------------------------------------------------------------------- lifetime

    def load(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Fill every resident prefix, verified, in large reads.

        progress  called as progress(bytes done, bytes in all, "weights")
        """
        self._alive()
        states = [s for s in self._states.values() if s.segment.n_slots]
        total = sum(s.segment.n_slots * s.source.slot_bytes for s in states)
        done = 0
        for state in states:
            for n_frames in self._picker.fill_prefix(state, self._clock):
                done += n_frames * state.source.slot_bytes
                if progress is not None:
                    progress(done, total, "weights")
        self._total.add(self._step)
        self._count_into(StepStats())

    def resize(
        self, resident: Mapping[str, int], *, ring_stages: int, fill: bool = True
    ) -> None:
        """Keep so many frames of each plane from now on, at most what the store was made for
        (planes not named keep none), and read ahead with so many stages.

        Between steps only.  What is given up leaves memory before anything is read; what is taken
        is filled as by `load`, or by `load` where this is not to `fill`.  After an error of reading
        the store serves the next step, with fewer frames kept.
        """
        self._alive()
        self._recover()
        self.n_resized += 1
        states = list(self._states.values())
        wanted = {s.name: int(resident.get(s.name, 0)) for s in states}
        for state in states:
            if wanted[state.name] > state.segment.n_most:
                raise UsageError(
                    f"plane {state.name}: {wanted[state.name]} frames to keep, the store was made "
                    f"for {state.segment.n_most}"
                )
        self._stream.reset()
        for state in states:
            self._picker.drop_prefetch(state)
            segment, n_slots = state.segment, wanted[state.name]
            if n_slots < segment.n_slots:
                self._step.prefetch_unused_bytes += state.resize(n_slots)
                self._memory.give_back_slots(segment)
        self._stream.use(self._memory.ring(self._stream.n_stages, ring_stages))
        for state in states:
            segment, n_slots = state.segment, wanted[state.name]
            if n_slots > segment.n_slots:
                self._memory.take_slots(segment, n_slots)
                state.resize(n_slots)
        for state in states:
            if fill and state.mode == "sweep":
                for _ in self._picker.fill_prefix(state, self._clock):
                    pass
        self._total.add(self._step)
        self._count_into(StepStats())

    def close(self) -> None:
        """Wait for reads in flight, stop the threads, give the memory back; idempotent.

        Address tables are zeroed: a kernel given one later reports an absent frame.  In a forked
        child nothing is waited for: reads and threads are the parent's.
        """
        if self._closed:
            return
        if os.getpid() == self._pid:
            self._recover()
        self._closed = True
        for state in self._states.values():
            state.segment.addresses[:] = 0
        self._shut_down()

    def _alive(self) -> None:
        if self._closed:
            raise ClosedError("the weight store is closed")

    # ------------------------------------------------------------------------------------ steps

    def begin_step(
        self, order: tuple[str, ...], *, admit: bool, next_order: tuple[str, ...] | None = None
    ) -> None:
        """Start a step that will scan or acquire these planes in this order.

        admit       whether this step teaches the cache (decoding) or passes it by (prompts)
        next_order  the order of the step after it, when it is known: read-ahead goes on into it
        """
        self._alive()
        self._recover()
        self._admit = admit
        self._clock += admit
        self._count_into(StepStats())
        looked, self._n_looks = self._n_looks, self._picker.n_looks
        for state in self._sparse:
            if state.prefetch is not None and not self._picked_now(state):
                self._picker.settle(state, self._clock)
            if self._adaptive and looked != self._n_looks:
                better = state.better_mode(self._picker.paces, self._pick_penalty)
                if better != state.mode:
                    self._change_mode(state, better)
        self._stream.follow(self._sweeps(order) + self._sweeps(next_order or ()))

    def _sweeps(self, order: tuple[str, ...]) -> list[SweepPlan]:
        states = [self._state(name) for name in order]
        return [state.sweep() for state in states if not self._picked_now(state)]

    def _picked_now(self, state: PlaneState) -> bool:
        return state.mode == "cached" and (self._admit or state.routed)

    def _change_mode(self, state: PlaneState, mode: str) -> None:
        """A sweep reads best around a resident prefix: scattered frames give way to it."""
        if mode == "sweep":
            for _ in self._picker.fill_prefix(state, self._clock):
                pass
        state.mode = mode

    def end_step(self) -> StepStats:
        """What the step did.  Safe after an error: open leases end here."""
        self._recover()
        self._step.steps = 1
        self._step.submit_ns = self._storage.submit_ns - self._submitted_ns
        done = self._step
        self._total.add(done)
        self._count_into(StepStats())
        if self._debug and not self._closed:
            self.check()
        return done

    def statistics(self) -> StepStats:
        """Sums over everything since the store was made, loading included."""
        sums = StepStats()
        sums.add(self._total)
        sums.add(self._step)
        return sums

    def _count_into(self, stats: StepStats) -> None:
        self._submitted_ns = self._storage.submit_ns
        self._step = self._leases.stats = stats
        self._stream.stats = self._demand.stats = self._picker.stats = stats

    # ----------------------------------------------------------------------------------- leases

    def scan(self, plane: str) -> Iterator[Lease]:
        """Leases over all items of a plane, ascending: the resident ones while others arrive."""
        state = self._state(plane)
        if lease := self.held(plane):  # nothing to wait for, to count or to clean up
            self._alive()
            self._end_iterator()
            return iter((lease,))
        return self._opened(self._leases.scan(state))

    def acquire(self, plane: str, ids: np.ndarray, *, unit: int = 0) -> Iterator[Lease]:
        """Leases over the items `ids` (int32, ascending, distinct) of a sparse plane.

        unit  `ids` are whole units of so many items whose order among each other does not matter:
              those in memory come first, so that computing with them hides the others' reads
        """
        state = self._state(plane)
        if not state.sparse:
            raise UsageError(f"plane {plane} is dense: scan it")
        if self._debug:
            self._check_ids(state, ids)
        now = {"clock": self._clock, "admit": self._admit}
        if state.whole:  # nothing to wait for, to pin or to clean up
            self._alive()
            self._end_iterator()
            self.note_used(len(ids))
            addresses = state.segment.addresses
            return iter((Lease(0, state.source.n_items, addresses, ids),) if len(ids) else ())
        if self._picked_now(state):
            return self._opened(self._leases.picked(state, ids, unit=unit, **now))
        return self._opened(self._leases.swept(state, ids, **now))

    def arriving(self, plane: str, ids: np.ndarray) -> Arriving | None:
        """`acquire` for kernels that take what arrives natively (KernelSet.adds_arriving); None
        where it takes leases.  It ends as iterators of leases do, or when it is closed."""
        state = self._state(plane)
        if not len(ids) or not state.sparse or state.whole or not self._picked_now(state):
            return None
        self._alive()
        if self._debug:
            self._check_ids(state, ids)
        self._end_iterator()
        arriving = self._leases.arriving(state, ids, clock=self._clock, admit=self._admit)
        self._open = arriving and weakref.ref(arriving)
        return arriving

    def audit(self, plane: str, ids: np.ndarray) -> Iterator[Lease]:
        """As `acquire`, as an extra look: its bytes are counted apart, and what is kept and
        remembered stays as it is."""
        state = self._state(plane)
        if not state.sparse:
            raise UsageError(f"plane {plane} is dense: scan it")
        if self._debug:
            self._check_ids(state, ids)
        return self._opened(self._leases.audited(state, ids))

    def gather(self, plane: str, ids: np.ndarray, out: np.ndarray) -> None:
        """Copy the items `ids` (any order, repeats allowed) into uint8 `out` [n, stride]."""
        self._alive()
        self._end_iterator()
        state = self._state(plane)
        if len(ids) and not 0 <= int(np.min(ids)) <= int(np.max(ids)) < state.source.n_items:
            raise UsageError(f"plane {plane} has items 0 to {state.source.n_items - 1}")
        self._picker.gather(state, ids, out, self._arena)

    def prefetch(self, plane: str, ids: np.ndarray, *, beside: np.ndarray | None = None) -> None:
        """Advice that `acquire` may soon ask for these items (int32, ascending).

        Never evicts what is pinned or is `beside` it (items, ascending), never waits, may do
        nothing; see StepStats.prefetch_….
        """
        self._alive()
        state = self._state(plane)
        if self._picked_now(state):
            self._picker.prefetch(state, ids, self._clock, beside)

    def absent(self, plane: str, ids: np.ndarray) -> np.ndarray:
        """bool[n]: which of these items of a sparse plane are neither in memory nor being read."""
        state = self._state(plane)
        return state.segment.frame_slot[ids // state.source.per_frame] < 0

    def held(self, plane: str) -> Lease | None:
        """A lease over a dense plane that is in memory as a whole, beside any iterator, until the
        step ends; None where looking at it would cost a read, or there is no such plane."""
        state = self._states.get(plane)
        if state is None or state.sparse or len(state.sweep()):
            return None
        return Lease(0, state.source.n_items, state.segment.addresses)

    def whole(self, plane: str) -> Lease | None:
        """As `held`, of a sparse plane; what is used of it is told to `note_used`."""
        state = self._states.get(plane)
        if state is None or not state.sparse or not state.whole:
            return None
        return Lease(0, state.source.n_items, state.segment.addresses)

    def note_used(self, n: int) -> None:
        """So many items were used out of sparse planes in memory as a whole: nothing of them can be
        evicted, so which they were need not be remembered."""
        self._step.hits += n

    def _opened(self, leases: Iterator[Lease]) -> Iterator[Lease]:
        self._alive()
        self._end_iterator()
        self._open = weakref.ref(leases)
        return leases

    def _end_iterator(self) -> None:
        """A lease ends when the next one is asked for: no two iterators are alive."""
        leases = self._open and self._open()
        self._open = None
        if leases is not None:
            leases.close()

    def _recover(self) -> None:
        """End the open iterator; where one was interrupted, even in its clean-up, make sure.

        After iterators that ran to their end nothing is repaired, so that check() finds our own
        mistakes.
        """
        self._end_iterator()
        if self._leases.unfinished:
            self._leases.unfinished = 0
            for state in self._states.values():
                state.recover()

    def _state(self, plane: str) -> PlaneState:
        try:
            return self._states[plane]
        except KeyError:
            raise UnknownNameError("plane", plane, list(self._states)) from None

    def memory(self) -> list[np.ndarray]:
        """uint8 views of the slots and ring stages in use, for measuring how fast they are read;
        not to be kept, empty once the store is closed."""
        if self._closed:
            return []
        segments = [state.segment for state in self._states.values()]
        return self._memory.in_use(segments, self._stream.n_stages)

    # ----------------------------------------------------------------------------------- checks

    def check(self) -> None:
        """Invariants of arena, ring and all segments; AssertionError with the numbers."""
        self._alive()
        self._arena.check()
        self._stream.check()
        idle = self._open is None or self._open() is None
        for state in self._states.values():
            state.segment.check(idle=idle and state.prefetch is None)

    @staticmethod
    def _check_ids(state: PlaneState, ids: np.ndarray) -> None:
        if ids.dtype != np.int32 or ids.ndim != 1:
            raise UsageError(f"ids are int32[n], not {ids.dtype}{list(ids.shape)}")
        if len(ids) and (ids[0] < 0 or ids[-1] >= state.source.n_items or (np.diff(ids) < 1).any()):
            raise UsageError(
                f"ids of plane {state.name} ascend within 0 to {state.source.n_items - 1}"
            )


def _shut_down(pid, sparse, picker, demand, stream, fetcher, arena) -> None:
    """What close() ends, in order; knows the parts and not the store, so that it can outlive it.

    Nothing in a forked child: reads and threads are the parent's.
    """
    if os.getpid() != pid:
        return
    for state in sparse:
        picker.drop_prefetch(state)
    demand.reset()
    stream.reset()
    fetcher.close()
    arena.close()
