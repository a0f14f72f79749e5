"""Runs of frames read natively, many at a time: the contract, and streams that use them against
streams that do not."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from flashllm._core import (
    FrameTables,
    ReadFailure,
    RunRead,
    end_runs,
    lend_runs,
    runs_arrived,
    xxh64,
)

from flashllm.errors import ChecksumError, ClosedError, FlashReadError, UsageError
from flashllm.offload.state import PlaneState

from .offload_model import ORDER, Model, read_scan, run_step
from .readers import READERS, opened

UNIT = 4096  # a multiple of every alignment met so far
N_UNITS = 12
SIZES = [UNIT, 100, 3 * UNIT - 1, 2 * UNIT, 1]  # of frames; they lie in units 1, 2, 3-5, 6-7, 8


@pytest.fixture
def content():
    return np.random.default_rng(7).integers(0, 256, N_UNITS * UNIT, np.uint8)


@pytest.fixture(params=READERS)
def storage(request, tmp_path, content):
    path = tmp_path / "content.bin"
    path.write_bytes(content.tobytes())
    with opened(request.param, path) as storage:
        yield storage


def tables_of(content, sizes=SIZES, seed=9, wrong=None):
    """Tables of frames of these stored sizes, each padded to UNIT, from the second unit on."""
    stored = np.array(sizes, np.uint32)
    padded = (stored.astype(np.int64) + UNIT - 1) // UNIT * UNIT
    offsets = (UNIT + np.cumsum(padded) - padded).astype(np.uint64)
    digests = [
        xxh64(content[int(at) : int(at) + int(n)], (int(at) + seed) % 2**64) ^ (i == wrong)
        for i, (at, n) in enumerate(zip(offsets, stored, strict=True))
    ]
    arrays = offsets, stored, np.array(digests, np.uint64)
    return FrameTables(*arrays, file_id=seed, alignment=UNIT)


def room(n_bytes=16 * UNIT):
    return np.frombuffer(mmap.mmap(-1, n_bytes), np.uint8)


def stages_of(n):
    """(stages, the memory of each)"""
    memories = [room() for _ in range(n)]
    return [RunRead(memory.ctypes.data) for memory in memories], memories


def rows(*runs):
    """(start, stop, offset, bytes) of runs given in units of the file."""
    return np.array([(a, b, UNIT * at, UNIT * n) for a, b, at, n in runs], np.int64)


def test_frames_arrive_where_the_stage_is(storage, content):
    tables = tables_of(content, seed=2**64 - 5)  # seeds wrap
    runs = rows((0, 2, 1, 2), (2, 3, 3, 3), (3, 5, 6, 3))
    stages, memories = stages_of(3)
    before = storage.submit_ns
    assert storage.submit_runs(tables, runs, 0, stages) == 8 * UNIT
    assert storage.submit_ns > before
    for stage in stages:
        stage.wait()
        assert stage.arrived() and stage.begun
    assert runs_arrived(stages, 9) == 3 and runs_arrived(stages, 2) == 2
    addresses = np.zeros(len(SIZES), np.uint64)
    assert lend_runs(stages, addresses) == [slice(0, 5)]
    for (start, stop, offset, n), memory, stage in zip(runs, memories, stages, strict=True):
        assert (memory[:n] == content[offset : offset + n]).all() and not memory[n:].any()
        assert (stage.start, stage.stop) == (start, stop)
        expected = tables.arrays[0][start:stop] + np.uint64(stage.shift)
        assert (addresses[start:stop] == expected).all() and expected[0] == memory.ctypes.data
    with pytest.raises(ValueError, match="frame 0 is present"):
        lend_runs(stages, addresses)
    end_runs(stages)
    end_runs(stages)
    assert not any(stage.begun or stage.arrived() for stage in stages)
    assert runs_arrived(stages, 3) == 0
    assert storage.submit_runs(tables, runs, 2, stages[:1]) == 3 * UNIT  # a stage begins anew
    stages[0].wait()
    assert (memories[0][: 3 * UNIT] == content[6 * UNIT : 9 * UNIT]).all()


def test_what_is_lent_comes_in_few_slices(storage, content):
    tables, addresses = tables_of(content), np.zeros(len(SIZES), np.uint64)
    runs = rows((0, 1, 1, 1), (1, 2, 2, 1), (4, 5, 8, 1))
    stages, memories = stages_of(3)
    storage.submit_runs(tables, runs, 0, stages)
    for stage in stages:
        stage.wait()
    assert lend_runs(stages, addresses) == [slice(0, 2), slice(4, 5)]
    assert (addresses != 0).tolist() == [True, True, False, False, True]
    with pytest.raises(ValueError, match="no rows"):
        lend_runs(stages, addresses[1:])
    assert all(memory.any() for memory in memories)
    end_runs(stages)
    with pytest.raises(ValueError, match="no rows"):
        lend_runs(stages, np.zeros(len(SIZES), np.uint64))  # nothing of it is there


@pytest.mark.parametrize("bad", range(1, 4))
def test_a_run_names_the_frame_whose_bytes_are_wrong(storage, content, bad):
    (stage,), memories = stages_of(1)
    storage.submit_runs(tables_of(content, wrong=bad), rows((1, 4, 2, 6)), 0, [stage])
    with pytest.raises(ReadFailure) as found:
        stage.wait()
    said = []
    error = storage.worded(found.value, lambda *place: said.append(place) or "a frame")
    assert isinstance(error, ChecksumError) and "a frame" in str(error)
    assert said == [(0, bad - 1)] and not stage.arrived() and memories[0].any()


# start, stop, offset, length (units)
REFUSED = {
    "nothing": (2, 2, 1, 1), "before the tables": (-1, 2, 1, 1), "behind them": (0, 6, 1, 9),
    "a frame before the extent": (0, 5, 2, 8), "a frame behind the extent": (0, 4, 1, 5),
    "no bytes": (0, 1, 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_tables_is_refused_and_so_are_those_with_it(storage, content, case):
    tables, (stages, memories) = tables_of(content), stages_of(2)
    with pytest.raises(UsageError):
        storage.submit_runs(tables, rows((0, 1, 1, 1), REFUSED[case]), 0, stages)
    assert not any(stage.begun for stage in stages) and not memories[1].any()
    assert storage.submit_runs(tables, rows((0, 1, 1, 1)), 0, stages[1:]) == UNIT


def test_stages_and_rows_must_be_what_they_say(storage, content):
    tables, runs = tables_of(content), rows((0, 1, 1, 1), (1, 2, 2, 1))
    (busy, other), memories = stages_of(2)
    storage.submit_runs(tables, runs, 0, [busy])
    for what in ([other, busy], [other, other], [other, None]):
        with pytest.raises(UsageError):
            storage.submit_runs(tables, runs, 0, what)
        assert busy.begun and not other.begun
    for first, n in ((-1, 1), (1, 2), (2, 1)):
        with pytest.raises(UsageError, match="no such runs"):
            storage.submit_runs(tables, runs, first, [other] * n)
    with pytest.raises(UsageError, match="no such runs"):
        storage.submit_runs(tables, runs[:, :3].copy(), 0, [other])
    with pytest.raises(ValueError, match="nothing to wait for"):
        other.wait()
    storage.close()
    with pytest.raises(ClosedError):
        storage.submit_runs(tables, runs, 0, [other])
    assert not other.begun and len(memories) == 2


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("ring_stages", [1, 3, 20])
@pytest.mark.parametrize("mode", ["sweep", "cached"])
@pytest.mark.parametrize("leaves", [False, True])
def test_streams_that_read_runs_do_what_others_do(
    tmp_path, monkeypatch, reader, ring_stages, mode, leaves
):
    """The same bytes, reads and slots; and where sweeps are left in the middle."""
    monkeypatch.setattr(PlaneState, "due", lambda *_: False)  # measured times would set the gaps
    native, slow = (Model(tmp_path / f"{i}.flash", reader=reader) for i in range(2))
    slow.storage.brings = False  # this instance
    found = []
    for model in (native, slow):
        store = model.store(model.share(0.3), mode=mode, ring_stages=ring_stages)
        rng, seen = np.random.default_rng(3), []
        for step in range(12):
            if leaves and step % 4 == 3:
                store.begin_step(ORDER, admit=True, next_order=ORDER)
                leases = store.scan("layers.0.qkv")
                next(leases), next(leases)
                leases.close()
                read_scan(model, store, "head")
                stats = store.end_step()
            else:
                stats = run_step(model, store, rng, admit=bool(step % 3))
            store.check()
            counts = {k: v for k, v in stats.as_dict().items() if not k.endswith("_ns")}
            if leaves:  # how much had been asked for by then is a matter of time
                for name in ("bytes_read", "bytes_dropped", "reads"):
                    del counts[name]
            seen.append(counts)
        pending = store._stream._pending
        assert any(stage.begun for stage in pending) == (model is native)
        slots = [s.segment.frame_slot.tolist() for s in store._states.values()]
        found.append((seen, slots, [stage.n_bytes for stage in pending]))
        model.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["byte", "cut"])
def test_what_cannot_be_read_is_named_and_asked_for_again(tmp_path, kind):
    path = tmp_path / "m.flash"
    model = Model(path)
    store = model.store()
    plane, bad = model.container.planes["layers.2.ffn"], 8
    whole = path.read_bytes()
    with open(path, "r+b") as file:
        at = int(plane.offsets[bad])
        if kind == "byte":
            file.seek(at + 5)
            file.write(bytes([whole[at + 5] ^ 1]))
        else:
            file.truncate(at)
    error = ChecksumError if kind == "byte" else FlashReadError
    where = r"plane layers.2.ffn, frame " + (r"8 \(items 64 to 71\)" if kind == "byte" else "")
    store.begin_step(ORDER, admit=True, next_order=ORDER)
    with pytest.raises(error, match=where):
        read_scan(model, store, "layers.2.ffn")
    store.end_step()
    store.check()
    # Read ahead for the step to come, in vain; when that asks for it, it is there again.
    store.begin_step(("layers.0.qkv",), admit=True, next_order=("layers.2.ffn",))
    read_scan(model, store, "layers.0.qkv")
    store.end_step()
    n_failed = 0
    for stage in store._stream._pending:
        try:
            stage.wait()
        except ReadFailure:
            n_failed += 1
    assert n_failed
    path.write_bytes(whole)
    store.begin_step(("layers.2.ffn",), admit=True)
    read_scan(model, store, "layers.2.ffn")
    store.end_step()
    store.check()
    model.close()
