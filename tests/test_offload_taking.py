"""Requests for frames: native and NumPy do the same to the same tables, whatever came before."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
from flashllm._core import FrameTables, SlotTables

from flashllm.cache.policies.lfu import LFU
from flashllm.cache.segment import Segment
from flashllm.offload.state import PlaneState
from flashllm.offload.taking import Taker, end_slowly, take_slowly


def source_of(n_frames: int) -> SimpleNamespace:
    offsets = 4096 * np.arange(n_frames, dtype=np.uint64)
    stored = np.full(n_frames, 3000, dtype=np.uint32)
    tables = FrameTables(offsets, stored, offsets, file_id=1, alignment=512)
    return SimpleNamespace(name="p", n_frames=n_frames, tables=tables, coded=False)


def plane(n_frames: int, n_slots: int, n_most: int, decay: float = 0.9) -> PlaneState:
    segment = Segment(
        name="p", n_frames=n_frames, n_slots=n_slots, n_most=n_most, slot_bytes=4096,
        address=1 << 20,
    )  # fmt: skip
    return PlaneState(
        source_of(n_frames), segment, index=0, stage_areas=(1, 1), max_gap=0, sparse=True,
        policy=LFU(n_most, decay=decay), mode="cached",
    )  # fmt: skip


def tables_of(state: PlaneState) -> dict[str, np.ndarray | int]:
    segment = state.segment
    return {
        "frame_slot": segment.frame_slot, "slot_frame": segment.slot_frame, "pins": segment.pins,
        "addresses": segment.addresses, "n_used": segment.n_used, "heat": state.policy.heat,
        "last_use": state.last_use, "prefetched": state.prefetched,
    }  # fmt: skip


def assert_same(a: PlaneState, b: PlaneState) -> None:
    for (name, x), y in zip(tables_of(a).items(), tables_of(b).values(), strict=True):
        assert np.array_equal(x, y), name


@pytest.mark.parametrize("seed", range(8))
def test_native_does_what_numpy_does(seed):
    rng = random.Random(seed)
    n_frames = rng.choice((1, 7, 60, 400))
    n_most = rng.randint(1, n_frames) if seed < 6 else 0
    native, slow = (plane(n_frames, n_most, n_most) for _ in range(2))
    assert native.tables is not None
    taker, clock = Taker(), 0
    for _ in range(120):
        clock += rng.choice((1, 1, 1, 5, 3000))  # far enough to have heat scaled down
        wanted = rng.sample(range(n_frames), rng.randint(0, min(n_frames, 40)))
        frames, admit = np.array(sorted(wanted), dtype=np.int32), rng.random() < 0.8
        for state in (native, slow):
            state._sweep = object()
            state.policy.worth(clock)  # scaled down now, not at the next use
        before = native.segment.frame_slot.copy()
        a = taker.take(native, frames, clock, admit=admit)
        b = take_slowly(slow, frames, clock, admit=admit)
        for name in ("hits", "missing", "placed", "targets", "unused_bytes"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
        if not np.array_equal(before, native.segment.frame_slot):
            assert native._sweep is None and slow._sweep is None
        assert_same(native, slow)
        arrived = rng.random() < 0.8  # otherwise some reads failed
        for state, taken in ((native, a), (slow, b)):
            segment = state.segment
            done = taken.placed if arrived else taken.placed[::2]
            segment.addresses[segment.slot_frame[done]] = segment.slot_address[done]
        taker.end(native, a)
        end_slowly(slow, b)
        if rng.random() < 0.2:  # as advice leaves them
            used = np.flatnonzero(native.segment.slot_frame >= 0)[::3]
            native.prefetched[used] = slow.prefetched[used] = True
        if rng.random() < 0.1:
            n = rng.randint(0, n_most)
            assert native.resize(n) == slow.resize(n)
        assert_same(native, slow)
        for state in (native, slow):
            state.segment.check(idle=True)


def test_pinned_slots_are_no_victims():
    state, taker = plane(40, 8, 8), Taker()
    first = taker.take(state, np.arange(8, dtype=np.int32), 1, admit=True)
    state.segment.publish(first.placed)
    taker.end(state, first)
    held = taker.take(state, np.arange(3, dtype=np.int32), 2, admit=True)
    more = taker.take(state, np.arange(20, 40, dtype=np.int32), 3, admit=True)
    assert len(held.hits) == 3 and len(more.placed) == 5
    assert (state.segment.frame_slot[:3] >= 0).all()
    assert np.count_nonzero(more.targets) == 5


def test_what_was_used_last_gets_the_slots_there_are():
    state, taker = plane(6, 2, 2), Taker()
    state.last_use[:] = [1, 5, 2, 5, 0, 4]
    taken = taker.take(state, np.arange(6, dtype=np.int32), 6, admit=True)
    assert state.segment.slot_frame.tolist() == [1, 3]
    assert np.flatnonzero(taken.targets).tolist() == [1, 3]


@pytest.mark.parametrize("frames", [[-1], [40], [3, 3], [4, 2]], ids=str)
def test_frames_that_are_no_ascending_rows_change_nothing(frames):
    state = plane(40, 8, 8)
    before = {k: np.copy(v) for k, v in tables_of(state).items()}
    with pytest.raises(ValueError, match="ascending rows"):
        Taker().take(state, np.array(frames, dtype=np.int32), 1, admit=True)
    assert all(np.array_equal(v, before[k]) for k, v in tables_of(state).items())


def test_a_frame_on_its_way_is_refused():
    state, taker = plane(40, 8, 8), Taker()
    taker.take(state, np.array([5], dtype=np.int32), 1, admit=True)  # placed, has not arrived
    with pytest.raises(ValueError, match="on its way"):
        taker.take(state, np.array([4, 5], dtype=np.int32), 2, admit=True)
    assert state.segment.frame_slot[4] < 0


def test_an_end_without_a_pin_is_told():
    state, taker = plane(40, 8, 8), Taker()
    taken = taker.take(state, np.array([5], dtype=np.int32), 1, admit=True)
    state.segment.publish(taken.placed)
    taker.end(state, taken)
    with pytest.raises(AssertionError, match="without a pin"):
        taker.end(state, taken)


def test_tables_that_do_not_fit_are_refused():
    state = plane(40, 8, 8)
    segment = state.segment
    with pytest.raises(ValueError, match="fit each other"):
        SlotTables(
            segment.frame_slot, state.last_use[:-1], segment.addresses, segment.slot_frame,
            segment.slot_address, segment.pins, state.prefetched.view(np.uint8), state.policy.heat,
        )  # fmt: skip


@pytest.mark.parametrize("decay", [0.5, 0.99, 1.0])
def test_worth_orders_uses_as_decay_does(decay):
    rng = np.random.default_rng(3)
    policy, clocks = LFU(50, decay=decay), np.sort(rng.choice(900, 60, replace=False))
    truth = np.zeros(50)
    for clock in clocks:
        used = rng.choice(50, 7, replace=False).astype(np.int32)
        policy.observe(used, int(clock))
        truth[used] += decay ** (clocks[-1] - float(clock))
    n = 10 if decay == 1 else 20
    limit = np.sort(truth)[n - 1]
    assert (truth[policy.victims(n, np.zeros(50, dtype=bool))] <= limit * (1 + 1e-9)).all()
