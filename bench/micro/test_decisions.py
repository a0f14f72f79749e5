"""Planner, segment and policies: what deciding costs beside copying the arrays decided on."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from flashllm.cache import POLICIES, Segment
from flashllm.offload.planner import coalesce, likely_misses, plan_sweep
from flashllm.units import KIB, MIB

N_FRAMES, N_SLOTS, N_WANTED, FRAME = 16384, 8192, 800, 6 * KIB  # a layer of a 7 B shape


def some(n: int, of: int = N_FRAMES, seed: int = 0) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(of, n, replace=False)).astype(np.int32)


@pytest.fixture
def copy():
    """The baseline: one copy of an int64 per frame."""
    source = np.arange(N_FRAMES, dtype=np.int64)
    target = np.empty_like(source)
    return lambda: np.copyto(target, source)


def test_coalesce(against, copy):
    frames = some(N_WANTED)
    offsets, lengths = frames.astype(np.int64) * FRAME, np.full(N_WANTED, FRAME, np.int64)
    run = partial(
        coalesce,
        frames, offsets, lengths, max_gap=16 * KIB, max_extent=MIB, max_frames=1024
    )
    against(run, copy, "memcpy of 8 B per frame")


def test_plan_sweep(against, copy):
    absent = np.ones(N_FRAMES, bool)
    absent[: N_FRAMES // 2] = False
    offsets, lengths = np.arange(N_FRAMES, dtype=np.int64) * FRAME, np.full(N_FRAMES, FRAME)
    run = partial(
        plan_sweep,
        absent, offsets, lengths, stage_bytes=MIB, decoded_bytes=0, decoded_stage_bytes=0,
        max_gap=16 * KIB,
    )  # fmt: skip
    against(run, copy, "memcpy of 8 B per frame")


def test_likely_misses(against, copy):
    last_use = np.random.default_rng(0).integers(0, 99, N_FRAMES).astype(np.int32)
    wanted = some(N_WANTED)
    run = partial(likely_misses, wanted, last_use, n_slots=N_SLOTS)
    against(run, copy, "memcpy of 8 B per frame")


def filled() -> Segment:
    segment = Segment(name="s", n_frames=N_FRAMES, n_slots=N_SLOTS, slot_bytes=FRAME, address=8192)
    slots = segment.place(some(N_SLOTS - N_WANTED))
    segment.publish(slots)
    segment.unpin(slots)
    return segment


def test_segment_place_publish_evict(against, copy):
    segment = filled()
    absent = np.flatnonzero(segment.frame_slot < 0).astype(np.int32)[:N_WANTED]

    def turn() -> None:
        slots = segment.place(absent)
        segment.publish(slots)
        segment.unpin(slots)
        segment.evict(slots)

    against(turn, copy, "memcpy of 8 B per frame")


def test_segment_lend_and_take_back(against, copy):
    segment = filled()
    absent = np.flatnonzero(segment.frame_slot < 0).astype(np.int32)[:N_WANTED]
    addresses = np.arange(1, N_WANTED + 1, dtype=np.uint64)

    def turn() -> None:
        segment.lend(absent, addresses)
        segment.take_back()

    against(turn, copy, "memcpy of 8 B per frame")


@pytest.mark.parametrize("name", [name for name in POLICIES.names() if name != "belady"])
def test_policy(name, against, copy):
    policy, clock = POLICIES[name](N_SLOTS), [0]
    policy.admit(np.arange(N_SLOTS, dtype=np.int32), np.arange(N_SLOTS, dtype=np.int32), 0)
    used, barred = some(N_WANTED, N_SLOTS), np.zeros(N_SLOTS, bool)
    barred[used] = True

    def turn() -> None:
        clock[0] += 1
        policy.observe(used, clock[0])
        policy.victims(N_WANTED // 4, barred)

    against(turn, copy, "memcpy of 8 B per frame")
