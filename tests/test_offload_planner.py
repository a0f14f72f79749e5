"""The planner against brute force; no files."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from flashllm._core import FrameTables
from hypothesis import given, settings
from hypothesis import strategies as st

from flashllm.offload.frames import FrameSource
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


# What reads are merged by.
KNOBS = st.fixed_dictionaries({
    "max_gap": st.sampled_from([0, 512, 4096, 10**9]),
    "max_extent": st.sampled_from([512, 5000, 1 << 20]),
    "max_frames": st.sampled_from([1, 3, 512]),
})  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(layouts(), KNOBS)
def test_coalesce_equals_brute_force(layout, knobs):
    lengths, offsets, wanted = layout
    frames = np.flatnonzero(wanted).astype(np.int32)
    offsets, lengths = offsets[frames], lengths[frames]
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
@given(layouts(), KNOBS)
def test_native_extents_are_the_planners(layout, knobs):
    lengths, offsets, wanted = layout
    stored = (lengths - np.arange(len(lengths)) % 512).astype(np.uint32)  # padded to 512 again
    tables = FrameTables(
        offsets.astype(np.uint64), stored, np.zeros(len(stored), np.uint64), file_id=1,
        alignment=512,
    )  # fmt: skip
    source = SimpleNamespace(tables=tables)
    frames = np.flatnonzero(wanted).astype(np.int32)
    found = FrameSource.extents(source, frames, **knobs)
    expected = coalesce(frames, offsets[frames], lengths[frames], **knobs)
    for name in ("frames", "first", "offset", "length"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype and a.tolist() == b.tolist(), name
    assert tables.n_bytes(frames) == lengths[frames].sum()
    repeated = np.concatenate((frames[::-1], frames))
    assert tables.n_bytes(repeated) == 2 * lengths[frames].sum()


@pytest.mark.parametrize("frames", [[-1], [3], [0, 3], [1, 0], [1, 1], [2**31 - 1]])
def test_frames_that_are_no_rows_are_refused(frames):
    n = len(frames)
    some, room = np.array(frames, np.int32), np.empty(n, np.int64)
    at, sizes = np.arange(3, dtype=np.uint64) * np.uint64(512), np.full(3, 512, np.uint32)
    tables = FrameTables(at, sizes, at, file_id=0, alignment=512)
    with pytest.raises(ValueError, match="rows"):
        tables.coalesce(some, 0, 512, 1, np.empty(n + 1, np.int32), room, room)
    with pytest.raises(ValueError, match="room"):
        tables.coalesce(some, 0, 512, 1, np.empty(n, np.int32), room, room)
    if min(frames) < 0 or max(frames) > 2:
        with pytest.raises(ValueError, match="rows"):
            tables.n_bytes(some)


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
    in_a_row = all(
        b == a + 1 and offsets[b] == ends[a]
        for chunk in chunks
        for a, b in zip(chunk, chunk[1:], strict=False)
    )
    assert (plan.runs is not None) == (in_a_row and not decoded_bytes)
    if plan.runs is not None:
        assert plan.runs.dtype == np.int64 and plan.runs.shape == (len(plan), 4)
        for (start, stop, offset, n_bytes), chunk in zip(plan.runs, chunks, strict=True):
            assert list(range(start, stop)) == chunk
            assert (offset, n_bytes) == (offsets[chunk[0]], lengths[chunk].sum())
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
