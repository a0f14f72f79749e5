"""The planner against brute force; no files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashllm.offload.planner import (
    cheaper_mode,
    coalesce,
    likely_misses,
    pick_seconds,
    plan_sweep,
    sweep_seconds,
    worthwhile_gap,
)

from .offload_model import AffineCurve


@st.composite
def layouts(draw):
    """Frames of a plane in a file: lengths, offsets (with holes between some), wanted ones."""
    n = draw(st.integers(1, 40))
    lengths = np.array(draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))) * 512
    holes = np.array(draw(st.lists(st.sampled_from([0, 0, 0, 4096]), min_size=n, max_size=n)))
    offsets = 512 + np.cumsum(lengths + holes) - lengths
    wanted = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    return lengths.astype(np.int64), offsets.astype(np.int64), wanted


def brute_coalesce(frames, offsets, lengths, max_gap, max_extent, max_frames):
    """One frame at a time: join the open extent when the gap, size and count allow."""
    extents: list[list[int]] = []
    for i in range(len(frames)):
        if extents:
            last = extents[-1]
            gap = offsets[i] - (offsets[last[-1]] + lengths[last[-1]])
            size = offsets[i] + lengths[i] - offsets[last[0]]
            if gap <= max_gap and size <= max_extent and len(last) < max_frames:
                last.append(i)
                continue
        extents.append([i])
    return extents


@settings(max_examples=300, deadline=None)
@given(
    layouts(),
    st.sampled_from([0, 512, 4096, 10**9]),
    st.sampled_from([512, 5000, 1 << 20]),
    st.sampled_from([1, 3, 512]),
)
def test_coalesce_equals_brute_force(layout, max_gap, max_extent, max_frames):
    lengths, offsets, wanted = layout
    frames = np.flatnonzero(wanted).astype(np.int32)
    offsets, lengths = offsets[frames], lengths[frames]
    knobs = {"max_gap": max_gap, "max_extent": max_extent, "max_frames": max_frames}
    found = coalesce(frames, offsets, lengths, **knobs)
    expected = brute_coalesce(frames, offsets, lengths, **knobs)
    assert [
        list(range(found.first[e], found.first[e + 1])) for e in range(len(found))
    ] == expected
    for e, members in enumerate(expected):
        assert found.offset[e] == offsets[members[0]]
        assert found.offset[e] + found.length[e] == offsets[members[-1]] + lengths[members[-1]]
    assert found.first.dtype == np.int32 and (found.frames == frames).all()
    assert found.n_bytes == sum(found.length.tolist())
    if len(found) > 1:
        part = found.part(1, len(found))
        assert part.frames.tolist() == frames[found.first[1] :].tolist()
        assert part.first[0] == 0 and part.first[-1] == len(part.frames)
        assert part.offset.tolist() == found.offset[1:].tolist()


@settings(max_examples=300, deadline=None)
@given(
    layouts(), st.sampled_from([0, 1024, 10**9]), st.sampled_from([4608, 9000]),
    st.sampled_from([0, 1000, 4500]),
)
def test_sweep_brings_every_absent_frame_in_order(layout, max_gap, stage_bytes, decoded_bytes):
    lengths, offsets, absent = layout
    plan = plan_sweep(
        absent, offsets, lengths,
        stage_bytes=stage_bytes, decoded_bytes=decoded_bytes, decoded_stage_bytes=5000,
        max_gap=max_gap,
    )  # fmt: skip
    chunks = [plan.frames(c).tolist() for c in range(len(plan))]
    read = [f for chunk in chunks for f in chunk]
    assert read == sorted(set(read)) and set(np.flatnonzero(absent)) <= set(read)
    assert plan.n_bytes == lengths[read].sum()
    assert plan.absent_bytes == lengths[absent].sum()
    for chunk in chunks:
        assert chunk and lengths[chunk].sum() <= stage_bytes
        assert len(chunk) * decoded_bytes <= 5000
    ends = offsets + lengths
    assert plan.runs == all(
        b == a + 1 and offsets[b] == ends[a]
        for chunk in chunks
        for a, b in zip(chunk, chunk[1:], strict=False)
    )
    for f in set(read) - set(np.flatnonzero(absent)):
        before = max(i for i in np.flatnonzero(absent) if i < f)
        after = min(i for i in np.flatnonzero(absent) if i > f)
        assert offsets[after] - offsets[before] - lengths[before] <= max_gap
    assert plan.cover[-1] == len(absent) and len(plan.cover) == len(plan) + 1
    present = set(np.flatnonzero(~absent))
    assert set(range(plan.cover[0])) <= present
    for c, chunk in enumerate(chunks):
        present |= set(chunk)
        assert set(range(plan.cover[c + 1])) <= present
        assert plan.cover[c] <= chunk[0] < plan.cover[c + 1]


def test_sweep_packs_stages_full():
    lengths = np.full(10, 100, dtype=np.int64)
    plan = plan_sweep(
        np.ones(10, dtype=bool), np.arange(10) * 100, lengths,
        stage_bytes=399, decoded_bytes=0, decoded_stage_bytes=0, max_gap=0,
    )  # fmt: skip
    assert plan.cuts.tolist() == [[0, 3], [3, 6], [6, 9], [9, 10]] and plan.read is None
    with pytest.raises(AssertionError, match="100 stored and 400 decoded"):
        plan_sweep(
            np.ones(10, dtype=bool), np.arange(10) * 100, lengths,
            stage_bytes=399, decoded_bytes=400, decoded_stage_bytes=399, max_gap=0,
        )  # fmt: skip


def test_costs_and_decision():
    curve = AffineCurve()
    frames = np.arange(0, 100, 10, dtype=np.int32)
    lengths = np.full(10, 16384, dtype=np.int64)
    extents = coalesce(
        frames, frames.astype(np.int64) * 16384, lengths, max_gap=0, max_extent=1 << 20,
        max_frames=512,
    )  # fmt: skip
    assert pick_seconds(extents, curve) == pytest.approx(10 * (40e-6 + 16384 / 1e9))
    assert pick_seconds(extents.part(0, 0), curve) == 0
    assert sweep_seconds(10**9, curve) == 1.0
    assert worthwhile_gap(curve, bytes_each=16384, limit=1 << 20) == pytest.approx(40_000, abs=1)
    assert worthwhile_gap(curve, bytes_each=16384, limit=4096) == 4096
    choose = {"hysteresis": 0.8}
    assert cheaper_mode("sweep", pick_s=0.79, sweep_s=1, **choose) == "cached"
    assert cheaper_mode("sweep", pick_s=0.81, sweep_s=1, **choose) == "sweep"
    assert cheaper_mode("cached", pick_s=1, sweep_s=0.81, **choose) == "cached"
    assert cheaper_mode("cached", pick_s=1, sweep_s=0.79, **choose) == "sweep"


def test_likely_misses_is_lru_by_stack_distance():
    rng = np.random.default_rng(5)
    last_use = np.full(30, -1, dtype=np.int32)
    stack: list[int] = []  # most recent first
    for clock in range(60):
        frame = int(rng.zipf(1.5)) % 30
        for n_slots in (0, 1, 4, 12, 30):
            found = likely_misses(np.array([frame], dtype=np.int32), last_use, n_slots=n_slots)
            assert (len(found) == 1) == (frame not in stack[:n_slots]), (clock, n_slots)
        last_use[frame] = clock
        stack = [frame] + [f for f in stack if f != frame]
