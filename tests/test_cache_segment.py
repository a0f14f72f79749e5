"""Segment: invariants under random verbs, and every broken promise is noticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flashllm.cache import POLICIES, Segment


def segment(n_frames=10, n_slots=4) -> Segment:
    return Segment(name="s", n_frames=n_frames, n_slots=n_slots, slot_bytes=512, address=8192)


def ints(*values) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_life_of_a_frame():
    s = segment()
    slots = s.place(ints(7, 3))
    assert slots.tolist() == [0, 1] and s.n_used == 2
    assert not s.addresses.any(), "absent while its read is in flight"
    s.check()
    s.publish(slots)
    assert s.addresses[7] == 8192 and s.addresses[3] == 8192 + 512
    with pytest.raises(AssertionError, match="pinned"):
        s.evict(slots)
    s.unpin(slots)
    s.check(idle=True)
    s.evict(slots[:1])
    assert s.addresses[7] == 0 and s.frame_slot[7] == -1 and s.n_free == 3
    assert s.place(ints(9)).tolist() == [0]
    s.abandon(ints(0))
    s.check(idle=True)


def test_lending():
    s = segment()
    s.lend(slice(2, 5), np.array([1, 2, 3], dtype=np.uint64))
    s.lend(ints(8), np.array([9], dtype=np.uint64))
    s.check()
    with pytest.raises(AssertionError, match="idle with 0 pinned slots and 4 lent"):
        s.check(idle=True)
    with pytest.raises(AssertionError, match="present"):
        s.lend(ints(3), np.array([5], dtype=np.uint64))
    s.take_back()
    assert not s.addresses.any()
    s.check(idle=True)


def test_what_was_lent_natively_is_taken_back():
    s = segment()
    s.addresses[2:4] = s.addresses[7] = 5
    s.note_lent([slice(2, 4), slice(7, 8)])
    s.check()
    s.take_back()
    assert not s.addresses.any()
    s.check(idle=True)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.unpin(ints(2)), "without a pin"),
        (lambda s: s.evict(ints(3)), "pinned or empty"),
        (lambda s: s.place(ints(0)), "already placed"),
        (lambda s: s.place(ints(3, 4, 5)), "2 slots are free"),
    ],
)
def test_misuse_is_refused(call, message):
    s = segment()
    s.publish(s.place(ints(0, 1)))
    with pytest.raises(AssertionError, match=message):
        call(s)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda s: s.frame_slot.__setitem__(0, 1), "slot 0 holds frame 0"),
        (lambda s: s.slot_frame.__setitem__(3, 9), "n_used says 2"),
        (lambda s: s.addresses.__setitem__(1, 77), "frame 1 has address 0x4d"),
        (lambda s: s.addresses.__setitem__(5, 77), "frame 5 has address"),
        (lambda s: s.pins.__setitem__(3, 1), "empty slot 3 is pinned"),
        (lambda s: s.pins.__setitem__(0, -1), "-1 pins"),
        (lambda s: s.addresses.__setitem__(0, 0), "load without a pin"),
        (lambda s: setattr(s, "n_used", 3), "n_used says 3"),
    ],
)
def test_check_notices_damage(damage, message):
    s = segment()
    slots = s.place(ints(0, 1))
    s.publish(slots)
    s.unpin(slots)
    s.check(idle=True)
    damage(s)
    with pytest.raises(AssertionError, match=message):
        s.check()


class Machine(RuleBasedStateMachine):
    """Segment and policy against a dictionary; a leased frame must stay where it is."""

    @initialize(
        name=st.sampled_from([n for n in POLICIES.names() if n != "belady"]),
        n_slots=st.integers(1, 6),
    )
    def start(self, name, n_slots):
        self.s = segment(12, n_slots)
        self.policy = POLICIES[name](n_slots)
        self.clock = 0
        self.where: dict[int, int] = {}
        self.leases: list[np.ndarray] = []

    @rule(frames=st.sets(st.integers(0, 11), min_size=1, max_size=5))
    def acquire(self, frames):
        self.clock += 1
        frames = np.array(sorted(frames), dtype=np.int32)
        slots = self.s.frame_slot[frames]
        hits, missing = slots[slots >= 0], frames[slots < 0]
        self.s.pin(hits)
        self.policy.observe(hits, self.clock)
        room = int((~self.s.barred()).sum()) + self.s.n_free
        missing = missing[:room]
        n_evict = max(0, len(missing) - self.s.n_free)
        victims = self.policy.victims(n_evict, self.s.barred())
        for frame in self.s.slot_frame[victims]:
            del self.where[int(frame)]
        self.s.evict(victims)
        new = self.s.place(missing)
        self.s.publish(new)
        self.policy.admit(new, missing, self.clock)
        for frame, slot in zip(missing, new, strict=True):
            self.where[int(frame)] = int(slot)
        self.leases.append(np.concatenate((hits, new)))

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 50))
    def release(self, which):
        self.s.unpin(self.leases.pop(which % len(self.leases)))

    @invariant()
    def sound(self):
        if hasattr(self, "s"):
            self.s.check(idle=not any(len(lease) for lease in self.leases))
            assert {
                int(f): int(s) for s, f in enumerate(self.s.slot_frame) if f >= 0
            } == self.where
            for frame, slot in self.where.items():
                assert self.s.addresses[frame] == 8192 + 512 * slot
            for lease in self.leases:
                assert (self.s.pins[lease] > 0).all()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
