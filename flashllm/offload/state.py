"""One plane inside the store: its source, slots, policy, mode, and the sweep that its absence asks.

A sparse plane is in one of two modes, changed only between steps: "sweep" (all that is absent
streams by in file order) or "cached" (only what is asked for is read, and a policy decides what
stays).  Which one never changes what is computed.  A routed plane (experts) is always cached: a few
of many experts are asked for, in prompts too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from .._core import SlotTables
from ..cache.arena import Arena
from ..cache.policies import POLICIES, Policy
from ..cache.policies.lfu import LFU
from ..cache.segment import Segment
from .fetch import Fetch
from .frames import FrameSource
from .planner import (
    Curve,
    Paces,
    SweepPlan,
    cheaper_mode,
    likely_misses,
    pick_seconds,
    plan_sweep,
    sweep_seconds,
    worthwhile_gap,
)
from .sizing import MAX_GAP

# Steps between two looks at a plane's costs, at first and from FAMILIAR on: a look takes 0.4 ms.
EVALUATE_EVERY, SELDOM, FAMILIAR = 8, 32, 64
HYSTERESIS = 0.8  # the other mode must cost less than this share of the current one
# A picked read is waited for, a sweep is read ahead.  Without it a dense set would stay picked:
# merged reads of nearly everything cost about as much as the sweep.  Not where planes begin cached.
PICK_PENALTY = 1.5
SMOOTHING = 0.5  # weight of the newest estimate


@dataclass(slots=True)
class Prefetch:
    """Advised frames on their way into these (pinned) slots."""

    fetch: Fetch
    slots: np.ndarray
    lengths: np.ndarray


class PlaneState:
    """See the module's text.  `index` is the plane's number, used to spread evaluations."""

    def __init__(
        self, source: FrameSource, segment: Segment, *, index: int,
        stage_areas: tuple[int, int], max_gap: int, sparse: bool, policy: Policy | None, mode: str,
        routed: bool = False,
    ):  # fmt: skip
        self.source, self.segment, self.policy = source, segment, policy
        self.name, self.sparse, self.mode, self.max_gap = source.name, sparse, mode, max_gap
        self.routed = routed
        self._index, self._stage_areas = index, stage_areas
        self._sweep: SweepPlan | None = None
        self._swept = -1, 0  # slots, and the bytes of the frames beyond as many
        self.pick_s: float | None = None  # recent costs of a step in either mode, when priced
        self.sweep_s = 0.0
        self.prefetch: Prefetch | None = None
        if sparse:
            self.last_use = np.full(source.n_frames, -1, dtype=np.int32)
            self.prefetched = np.zeros(segment.n_most, dtype=bool)
        self.tables: SlotTables | None = None  # for native requests
        self.arrives = False  # whether `Picker.arriving` does what `pick` would, nothing advised
        self.most_frames = 1  # of one read on demand
        if sparse and isinstance(policy, LFU):
            self.tables = SlotTables(
                segment.frame_slot, self.last_use, segment.addresses, segment.slot_frame,
                segment.slot_address, segment.pins, self.prefetched.view(np.uint8), policy.heat,
            )  # fmt: skip

    @property
    def whole(self) -> bool:
        """Whether every frame is in its slot, between requests."""
        return self.segment.n_used == self.source.n_frames and self.prefetch is None

    # ------------------------------------------------------------------------------------ sweep

    def sweep(self) -> SweepPlan:
        """The sweep over what is absent now; the same object until `residency_changed`."""
        if self._sweep is None:
            source = self.source
            offsets, lengths = source.places(slice(None))
            self._sweep = plan_sweep(
                self.segment.frame_slot < 0, offsets, lengths,
                stage_bytes=self._stage_areas[0],
                decoded_bytes=source.slot_bytes if source.coded else 0,
                decoded_stage_bytes=self._stage_areas[1], max_gap=self.max_gap, owner=source,
            )  # fmt: skip
        return self._sweep

    def residency_changed(self) -> None:
        self._sweep = None

    # ------------------------------------------------------------------------------------- mode

    def due(self, clock: int) -> bool:
        """Whether this step is one of those whose costs are looked at: now and then, and as soon
        as can be whether a sweep that the plane began with is worth it."""
        every = EVALUATE_EVERY if clock < FAMILIAR else SELDOM
        regular = (clock + self._index) % every == 0
        return not self.routed and (regular or (self.pick_s is None and self.mode == "sweep"))

    def price(self, frames: np.ndarray, curve: Curve, paces: Paces, extents_of) -> None:
        """What the reads for these frames, int32 ascending, would take, picked (under LRU) and
        swept (prefix resident); before their use is remembered."""
        n_slots = self.segment.n_slots
        self.max_gap = paces.gap(curve, bytes_each=self.source.slot_bytes, limit=MAX_GAP)
        missing = likely_misses(frames, self.last_use, n_slots=n_slots)
        pick_s = pick_seconds(extents_of(self, missing), curve)
        if self._swept[0] != n_slots:
            _, lengths = self.source.places(slice(n_slots, None))
            self._swept = n_slots, int(lengths.sum())
        self.sweep_s = sweep_seconds(self._swept[1], curve)
        before = pick_s if self.pick_s is None else self.pick_s
        self.pick_s = before + SMOOTHING * (pick_s - before)

    def better_mode(self, paces: Paces, penalty: float) -> str:
        """The mode for the next steps, where a picked second counts `penalty` swept ones."""
        if self.pick_s is None:  # never priced: too early, or routed
            return self.mode
        return cheaper_mode(
            self.mode, pick_s=penalty * paces.pick * self.pick_s,
            sweep_s=paces.sweep * self.sweep_s, hysteresis=HYSTERESIS,
        )  # fmt: skip

    # ----------------------------------------------------------------------------------- upkeep

    def make_room(self, n: int) -> int:
        """Evict victims until `n` slots are free, or as many as can be; returns the bytes of
        victims that were prefetched and never used."""
        segment = self.segment
        n_evict = n - segment.n_free
        if n_evict <= 0:
            return 0
        barred = segment.barred()
        n_evict = min(n_evict, int(np.count_nonzero(~barred)))
        return self.evict(self.policy.victims(n_evict, barred))

    def evict(self, slots: np.ndarray) -> int:
        """Empty these slots; returns the bytes of frames prefetched and never used."""
        unused = slots[self.prefetched[slots]]
        self.prefetched[slots] = False
        n_bytes = self.source.tables.n_bytes(self.segment.slot_frame[unused])
        self.segment.evict(slots)
        self.residency_changed()
        return n_bytes

    def resize(self, n_slots: int) -> int:
        """Use only the first `n_slots` slots, or more again, up to the segment's `n_most`;
        returns the bytes of frames that were prefetched, never used, and are now lost."""
        segment, unused = self.segment, 0
        beyond = np.flatnonzero(segment.slot_frame[n_slots:] >= 0).astype(np.int32) + n_slots
        if self.sparse:
            unused = self.evict(beyond)
        elif len(beyond):
            segment.evict(beyond)
        segment.resize(n_slots)
        self.residency_changed()
        return unused

    def recover(self) -> None:
        """After an interruption: no lease is out, so nothing may stay pinned, lent or half read."""
        segment = self.segment
        segment.take_back()
        segment.addresses[segment.frame_slot < 0] = 0  # what was lent natively
        if self.prefetch is None and segment.pins.any():
            segment.pins[:] = 0
            segment.recount()
            used = np.flatnonzero(segment.slot_frame >= 0)
            loading = used[segment.addresses[segment.slot_frame[used]] == 0]
            segment.evict(loading)
            self.residency_changed()


def make_states(
    container,
    arena: Arena,
    *,
    resident: Mapping[str, int],
    most: Mapping[str, int],
    sparse: Collection[str],
    routed: Collection[str],
    policy: str,
    policy_options: Mapping,
    mode: str,
    curve: Curve,
    stage_areas: tuple[int, int],
) -> dict[str, PlaneState]:
    """A state for every plane of the container, with its slots cut from the arena's regions."""
    make_policy = POLICIES[policy]
    states = {}
    for index, (name, plane) in enumerate(container.planes.items()):
        source = FrameSource(plane, container.alignment)
        n_most, is_sparse = most.get(name, 0), name in sparse
        segment = Segment(
            name=name, n_frames=plane.n_frames, n_slots=resident.get(name, 0), n_most=n_most,
            slot_bytes=source.slot_bytes,
            address=arena[f"slots of {name}"].address if n_most else 0,
        )  # fmt: skip
        states[name] = PlaneState(
            source, segment, index=index, stage_areas=stage_areas,
            max_gap=worthwhile_gap(curve, bytes_each=source.slot_bytes, limit=MAX_GAP),
            sparse=is_sparse, policy=make_policy(n_most, **policy_options) if is_sparse else None,
            mode=_first_mode(mode, is_sparse, name in routed), routed=name in routed,
        )  # fmt: skip
    return states


def _first_mode(asked: str, is_sparse: bool, is_routed: bool) -> str:
    """A plane's mode to begin with, under the store's `mode`."""
    if is_routed:
        return "sweep" if asked == "sweep" else "cached"
    return "cached" if is_sparse and asked == "cached" else "sweep"
