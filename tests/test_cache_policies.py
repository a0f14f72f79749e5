"""Policies against a slow reference, golden miss counts, and the contract over the table."""

from __future__ import annotations

import numpy as np
import pytest

from flashllm.cache import POLICIES, Segment
from flashllm.errors import UnknownNameError

from .slow_cache import slow_misses

N_FRAMES, N_STEPS = 60, 80


def zipf_trace(seed: int, n_used: int = 8) -> list[np.ndarray]:
    """A skewed trace with drift: each step uses `n_used` distinct frames."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / (1 + np.arange(N_FRAMES)) ** 0.9
    order = rng.permutation(N_FRAMES)
    steps = []
    for step in range(N_STEPS):
        if step % 10 == 0:  # a few frames change their rank
            a, b = rng.integers(0, N_FRAMES, size=(2, 6))
            order[a], order[b] = order[b].copy(), order[a].copy()
        chosen = rng.choice(N_FRAMES, size=n_used, replace=False, p=weights / weights.sum())
        steps.append(np.sort(order[chosen]).astype(np.int32))
    return [np.unique(step) for step in steps]


def make(name: str, n_slots: int, trace):
    return POLICIES[name](n_slots, **({"future": trace} if name == "belady" else {}))


def misses_of(name: str, n_slots: int, trace) -> int:
    """Run Segment + policy over the trace as the store does: pin hits, evict, place, publish."""
    segment = Segment(name="t", n_frames=N_FRAMES, n_slots=n_slots, slot_bytes=64, address=4096)
    policy = make(name, n_slots, trace)
    n_misses = 0
    for clock, frames in enumerate(trace):
        slots = segment.frame_slot[frames]
        hits = slots[slots >= 0]
        segment.pin(hits)
        policy.observe(hits, clock)
        missing = frames[slots < 0]
        n_misses += len(missing)
        n_evict = max(0, len(missing) - segment.n_free)
        victims = policy.victims(n_evict, segment.barred())
        assert not segment.pins[victims].any()
        segment.evict(victims)
        new = segment.place(missing)
        segment.check()
        segment.publish(new)
        policy.admit(new, missing, clock)
        segment.unpin(np.concatenate((hits, new)))
        segment.check(idle=True)
    return n_misses


@pytest.mark.parametrize("name", POLICIES.names())
@pytest.mark.parametrize("n_slots", [8, 13, 30, 60])
@pytest.mark.parametrize("seed", [1, 2])
def test_same_misses_as_slow_reference(name, n_slots, seed):
    trace = zipf_trace(seed)
    assert misses_of(name, n_slots, trace) == len(slow_misses(trace, n_slots, name))


GOLDEN = {  # policy -> misses of zipf_trace(7) with 10, 20 and 40 slots (out of 640 uses)
    "window": [419, 291, 155],
    "lru": [419, 291, 138],
    "lfu": [404, 286, 130],
    "belady": [347, 177, 81],
}


def test_golden_miss_counts():
    trace = zipf_trace(7)
    found = {name: [misses_of(name, n, trace) for n in (10, 20, 40)] for name in POLICIES}
    assert found == GOLDEN
    for name in POLICIES:
        assert all(np.array(GOLDEN["belady"]) <= GOLDEN[name]), name


@pytest.mark.parametrize("name", POLICIES.names())
def test_victims_are_distinct_open_and_repeatable(name):
    rng = np.random.default_rng(3)
    trace = zipf_trace(3)
    policy = make(name, 20, trace)
    policy.admit(np.arange(20, dtype=np.int32), np.arange(20, dtype=np.int32), 0)
    for clock in range(1, 30):
        policy.observe(np.flatnonzero(rng.random(20) < 0.3).astype(np.int32), clock)
        barred = rng.random(20) < 0.5
        n_open = int((~barred).sum())
        for n in {0, 1, n_open // 2, n_open}:
            victims = policy.victims(n, barred)
            assert victims.dtype == np.int32 and len(victims) == n
            assert len(np.unique(victims)) == n and not barred[victims].any()
            assert (policy.victims(n, barred) == victims).all()
        with pytest.raises(AssertionError, match="victims asked"):
            policy.victims(n_open + 1, barred)


def test_unknown_policy_lists_the_known():
    with pytest.raises(UnknownNameError, match="belady, lfu, lru, window"):
        POLICIES["clock"]
