"""The storage contract, run over every way to read (readers.py) and over the wrappers."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from flashllm._core import FrameTables, xxh64

from flashllm.errors import (
    ChecksumError,
    ClosedError,
    FlashReadError,
    FormatError,
    UnknownNameError,
    UnsupportedError,
    UsageError,
)
from flashllm.offload.planner import coalesce
from flashllm.storage import STORAGES, ReadBatch, open_storage
from flashllm.storage.base import Storage
from flashllm.storage.wrappers import FaultyStorage, SlowStorage
from flashllm.stress.confine import make_cold

from . import readers
from .patience import patience
from .readers import READERS

UNIT = 4096  # a multiple of every alignment met so far
N_UNITS = 600


# A wrapper with nothing to do must be as good as what it wraps.
WRAPPERS = {
    "slow": lambda inner: SlowStorage(inner, seconds_per_read=1e-9, sleep=lambda seconds: None),
    "faulty": lambda inner: FaultyStorage(inner, lambda ordinal, offset, length: None),
}


def opened(name, path, **options):
    if name in WRAPPERS:
        return WRAPPERS[name](open_storage("pread", path, **options))
    return readers.opened(name, path, **options)


def room(n_bytes):
    """Page-aligned memory of our own, zeroed."""
    return np.frombuffer(mmap.mmap(-1, max(n_bytes, 1)), np.uint8)[:n_bytes]


@pytest.fixture(params=[*READERS, *WRAPPERS])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(7).integers(0, 256, N_UNITS * UNIT + 700, np.uint8)


@pytest.fixture
def path(tmp_path, content):
    path = tmp_path / "content.bin"
    path.write_bytes(content.tobytes())
    return path


@pytest.fixture
def storage(name, path):
    with opened(name, path) as storage:
        yield storage


def scattered(content, storage, seed, n=120):
    """Extents of 1..4 units over shuffled destinations of whole units, each with its check."""
    rng = np.random.default_rng(seed)
    first = np.sort(rng.choice(N_UNITS // 4, n, replace=False)) * 4
    units = rng.integers(1, 5, n)
    memory = room(int(units.sum()) * UNIT)
    iov_start = np.concatenate([[0], np.cumsum(units)]).astype(np.int32)
    spots = rng.permutation(int(units.sum()))
    address = (memory.ctypes.data + spots * UNIT).astype(np.uint64)
    source = np.concatenate([f + np.arange(u) for f, u in zip(first, units, strict=True)])
    digest = [xxh64(content[u * UNIT : (u + 1) * UNIT], seed + int(u)) for u in source]
    lengths = np.full(len(spots), UNIT, np.int64)
    batch = ReadBatch(
        (first * UNIT).astype(np.int64),
        (units * UNIT).astype(np.int64),
        iov_start,
        address,
        lengths,
        iov_start,
        address,
        lengths,
        (seed + source).astype(np.uint64),
        np.array(digest, np.uint64),
    )
    batch.validate()
    expected = np.zeros_like(memory).reshape(-1, UNIT)
    expected[spots] = content[: N_UNITS * UNIT].reshape(-1, UNIT)[source]
    return batch, memory, expected.reshape(-1)


def test_scatters_many_extents_and_checks_them(storage, content):
    batch, memory, expected = scattered(content, storage, 1)
    with storage.submit(batch) as ticket:
        ticket.wait()
        assert ticket.done() == len(batch)
        np.testing.assert_array_equal(memory, expected)
    stats = storage.stats()
    assert stats["bytes_read"] == batch.n_bytes and stats["n_retries"] == 0
    assert stats["n_reads"] >= len(batch) and stats["read_ns"] > 0


def test_the_prefix_that_wait_names_has_arrived(storage, content):
    batch, memory, expected = scattered(content, storage, 2)
    spots = (batch.iov_address - np.uint64(memory.ctypes.data)).astype(int)
    with storage.submit(batch) as ticket:
        for upto in (0, 1, 5, 60, len(batch)):
            ticket.wait(upto)
            assert upto <= ticket.done() <= len(batch)
            for at in spots[: batch.iov_start[upto]]:
                np.testing.assert_array_equal(memory[at : at + UNIT], expected[at : at + UNIT])


def test_one_extent_over_more_destinations_than_a_call_takes(storage, content):
    step = storage.alignment if storage.alignment > 1 else 100
    n = 2500
    memory = room(n * step)
    order = np.random.default_rng(3).permutation(n)
    batch = ReadBatch(
        np.array([0], np.int64),
        np.array([n * step], np.int64),
        np.array([0, n], np.int32),
        (memory.ctypes.data + order * step).astype(np.uint64),
        np.full(n, step, np.int64),
        np.zeros(2, np.int32),
        *(np.empty(0, dtype) for dtype in (np.uint64, np.int64, np.uint64, np.uint64)),
    )
    with storage.submit(batch) as ticket:
        ticket.wait()
    np.testing.assert_array_equal(
        memory.reshape(n, step)[order], content[: n * step].reshape(n, step)
    )

def some_frames(content, seed):
    """Frames of a plane with holes in the file, extents over some of them, and targets in a memory
    of slots: neighbours, slots apart, and zeros to be filled in."""
    rng = np.random.default_rng(seed)
    n = 60
    units = rng.integers(1, 4, n)
    holes = rng.choice([0, 0, 1, 2], n)
    offsets = ((1 + np.cumsum(units + holes) - units) * UNIT).astype(np.uint64)
    stored = (units * UNIT - rng.choice([0, 1, 700], n)).astype(np.uint32)
    digests = [
        xxh64(content[int(at) : int(at) + int(size)], int(at) + seed)
        for at, size in zip(offsets, stored, strict=True)
    ]
    tables = FrameTables(
        offsets, stored, np.array(digests, np.uint64), file_id=seed, alignment=UNIT
    )
    frames = np.flatnonzero(rng.random(n) < 0.6).astype(np.int32)
    knobs = {"max_gap": 2 * UNIT, "max_extent": 30 * UNIT, "max_frames": 7}
    lengths = -(-stored.astype(np.int64) // UNIT) * UNIT
    places = offsets[frames].astype(np.int64), lengths[frames]
    slots = np.sort(rng.permutation(n)[: len(frames)])
    is_placed = rng.random(len(frames)) < [0.0, 0.5, 1.0][seed % 3]
    return tables, coalesce(frames, *places, **knobs), slots, is_placed


def read_frames(submit, some, start, stop, n_slots=60):
    """What `submit` says and leaves in memory, of extents [start, stop)."""
    tables, extents, slots, is_placed = some
    step, memory = 3 * UNIT, room((2 * n_slots + 3) * 3 * UNIT)
    at = memory.ctypes.data
    targets = np.where(is_placed, at + slots * step, 0).astype(np.uint64)
    said = []
    ticket = submit(
        extents, start, stop, tables, targets, room=at + n_slots * step,
        room_bytes=n_slots * step, step=step, trash=at + 2 * n_slots * step,
        describe=lambda extent, check: said.append((extent, check)) or "a frame",
    )  # fmt: skip
    failed = None
    with ticket:
        try:
            ticket.wait()
        except ChecksumError as error:
            failed = (error.where, error.expected, error.found)
    kept = memory[: 2 * n_slots * step].tobytes()  # in the trash the last read wins
    return (targets - np.uint64(at)).tolist(), kept, said, failed


def slowly(storage):
    """submit_frames as the contract says it, in arrays."""
    return lambda *arguments, **options: Storage.submit_frames(storage, *arguments, **options)


@pytest.mark.parametrize("seed", range(3))
def test_frames_are_read_as_the_contract_says(storage, content, seed):
    some = tables, extents, slots, is_placed = some_frames(content, seed)
    n = len(extents)
    for start, stop in [(0, n), (n // 3, n), (1, n // 2), (n - 1, n)]:
        before = storage.stats()
        targets, memory, *said = read_frames(storage.submit_frames, some, start, stop)
        between = storage.stats()
        assert [targets, memory, *said] == list(
            read_frames(slowly(storage), some, start, stop)
        )
        after = storage.stats()
        for name in ("bytes_read", "n_reads"):
            assert between[name] - before[name] == after[name] - between[name]
        assert said == [[], None]
        for k in range(extents.first[start], extents.first[stop]):
            offset, size, _ = (int(a[extents.frames[k]]) for a in tables.arrays)
            assert memory[targets[k] : targets[k] + size] == bytes(content[offset : offset + size])


@pytest.mark.parametrize("seed", range(3))
def test_frames_that_are_wrong_are_named_as_the_contract_says(storage, content, seed):
    some = tables, extents, _, _ = some_frames(content, seed)
    for frame in extents.frames[::3]:
        tables.arrays[2][frame] ^= np.uint64(1)
        for start in (0, 1):
            # Later extents may or may not have begun when a ticket is closed: not their memory.
            targets, _, *found = read_frames(storage.submit_frames, some, start, len(extents))
            expected = read_frames(slowly(storage), some, start, len(extents))
            assert (targets, found) == (expected[0], list(expected[2:]))
            assert (found[1] is None) == (frame < extents.frames[extents.first[start]])
        tables.arrays[2][frame] ^= np.uint64(1)


# what is changed -> (of the extents or of the call, what it is then)
FRAMES_REFUSED = {
    "a frame before the tables": {"frames": lambda a: np.where(a == a[3], -1, a).astype(np.int32)},
    "a frame behind the tables": {"frames": lambda a: np.where(a == a[3], 60, a).astype(np.int32)},
    "another frame": {"frames": lambda a: np.where(a == a[3], a[2], a).astype(np.int32)},
    "starts that go back": {"first": lambda a: a[::-1].copy()},
    "starts behind the frames": {"first": lambda a: a + np.int32(1)},
    "starts before the frames": {"first": lambda a: a - np.int32(1)},
    "fewer starts": {"first": lambda a: a[:-1].copy()},
    "a longer extent": {"length": lambda a: a + UNIT},
    "a shorter extent": {"length": lambda a: a - UNIT},
    "an extent before the file": {"offset": lambda a: -a},
    "fewer targets": {"targets": lambda a: a[:-1].copy()},
    "extents backwards": {"start": lambda _: 3, "stop": lambda _: 2},
    "no extents": {"stop": lambda _: 0},
    "extents before the first": {"start": lambda _: -1},
    "extents behind the last": {"stop": lambda n: n + 1},
    "too little room": {"room_bytes": lambda n: n - 1},
    "room around zero": {"room": lambda _: 2**64 - 3 * UNIT, "room_bytes": lambda _: 4 * UNIT},
}


@pytest.mark.parametrize("name", READERS)
def test_frames_that_do_not_fit_their_tables_are_refused(name, path, content):
    with opened(name, path) as storage:
        for case in FRAMES_REFUSED:
            check_refused(storage, content, FRAMES_REFUSED[case], case)


def check_refused(storage, content, changes, case):
    tables, extents, _, _ = some_frames(content, 0)  # all targets are to be filled in
    n, step = len(extents.frames), 3 * UNIT
    memory = room((n + 3) * step)
    values = {k: getattr(extents, k) for k in ("frames", "first", "offset", "length")}
    values |= {"start": 0, "stop": len(extents), "targets": np.zeros(n, np.uint64)}
    values |= {"room": memory.ctypes.data, "room_bytes": n * step}
    changed = {k: changes[k](v) if k in changes else v for k, v in values.items()}
    some = SimpleNamespace(**changed)
    before = storage.stats()
    try:
        storage.submit_frames(
            some, some.start, some.stop, tables, some.targets, room=some.room,
            room_bytes=some.room_bytes, step=step, trash=memory.ctypes.data + n * step,
        )  # fmt: skip
        pytest.fail(f"taken: {case}")
    except UsageError:
        assert not memory.any() and storage.stats() == before, case


def test_an_empty_batch_is_done_at_once(storage):
    with storage.submit(ReadBatch.plain([], [], [])) as ticket:
        ticket.wait()
        assert ticket.done() == 0


def test_two_batches_at_once_from_two_threads(storage, content):
    def run(seed, results):
        for k in range(5):
            batch, memory, expected = scattered(content, storage, seed + k)
            with storage.submit(batch) as ticket:
                ticket.wait()
            results.append(bool((memory == expected).all()))

    results: list[bool] = []
    threads = [threading.Thread(target=run, args=(seed, results)) for seed in (10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 10


# ------------------------------------------------------------------------------------ failures


def test_a_flipped_byte_is_read_again_and_refused(name, path, content):
    with open(path, "r+b") as file:
        file.seek(50 * UNIT + 17)
        file.write(bytes([content[50 * UNIT + 17] ^ 1]))
        file.flush()
        os.fsync(file.fileno())
    with opened(name, path) as storage:
        starts = np.arange(40, 60) * UNIT
        memory = room(20 * UNIT)
        digests = [xxh64(content[s : s + UNIT], 5) for s in starts]
        batch = ReadBatch.plain(
            starts,
            np.full(20, UNIT),
            memory.ctypes.data + np.arange(20) * UNIT,
            seed=np.full(20, 5),
            digest=np.array(digests, np.uint64),
        )
        told = []

        def describe(extent, check):
            told.append((extent, check))
            return "layer 3, frame 50"

        with storage.submit(batch, describe) as ticket:
            ticket.wait(10)
            with pytest.raises(ChecksumError, match="layer 3, frame 50 at offset 204800") as raised:
                ticket.wait()
            assert raised.value.path == str(path) and told == [(10, 0)]
            assert ticket.done() == 10
            with pytest.raises(ChecksumError):
                ticket.wait(11)
            ticket.wait(10)
        assert storage.stats()["n_retries"] == 1
        # Extents behind the bad one may not have been begun when the ticket was closed.
        assert 12 * UNIT <= storage.stats()["bytes_read"] <= 21 * UNIT


def test_the_first_failure_in_order_is_raised(storage):
    """Every second extent is wrong; whichever finishes first, the lowest is the one named."""
    n = 64
    memory = room(n * UNIT)
    wrong = np.arange(n) % 2 == 1
    data = [xxh64(storage.read(k * UNIT, UNIT)) ^ int(w) for k, w in enumerate(wrong)]
    batch = ReadBatch.plain(
        np.arange(n) * UNIT,
        np.full(n, UNIT),
        memory.ctypes.data + np.arange(n) * UNIT,
        seed=np.zeros(n),
        digest=np.array(data, np.uint64),
    )
    with storage.submit(batch) as ticket, pytest.raises(ChecksumError, match="extent 1, check 0"):
        ticket.wait()


def end_of(error):
    return (error.errno, error.offset)


def test_the_end_of_the_file_inside_an_extent(storage, content):
    memory = room(4 * UNIT)
    batch = ReadBatch.plain(
        [(N_UNITS - 2) * UNIT, (N_UNITS - 1) * UNIT],
        [UNIT, 2 * UNIT],
        memory.ctypes.data + np.array([0, UNIT]),
    )
    with storage.submit(batch) as ticket:
        with pytest.raises(FlashReadError, match="extent 1") as raised:
            ticket.wait()
        assert end_of(raised.value) == (errno.ENODATA, len(content))
        assert ticket.done() == 1


@pytest.mark.parametrize("left", [0, 20 * UNIT, 20 * UNIT + 100])
def test_a_file_that_shrinks_while_open(name, tmp_path, content, left):
    path = tmp_path / "shrinks.bin"
    path.write_bytes(content[: 64 * UNIT].tobytes())
    with opened(name, path) as storage:
        os.truncate(path, left)
        memory = room(64 * UNIT)
        offsets = np.arange(64) * UNIT
        batch = ReadBatch.plain(offsets, np.full(64, UNIT), memory.ctypes.data + offsets)
        with storage.submit(batch) as ticket:
            ticket.wait(left // UNIT)
            with pytest.raises(FlashReadError, match=f"ends at {left}") as raised:
                ticket.wait()
            assert raised.value.errno == errno.ENODATA and ticket.done() == left // UNIT
        np.testing.assert_array_equal(memory[: left // UNIT * UNIT], content[: left // UNIT * UNIT])
        with pytest.raises(FlashReadError):
            storage.read(30 * UNIT, 100)


def test_a_failed_batch_leaves_the_storage_usable(storage, content):
    memory = room(UNIT)
    beyond = ReadBatch.plain([2 * N_UNITS * UNIT], [UNIT], [memory.ctypes.data])
    with storage.submit(beyond) as ticket, pytest.raises(FlashReadError):
        ticket.wait()
    batch, memory, expected = scattered(content, storage, 4)
    with storage.submit(batch) as ticket:
        ticket.wait()
    np.testing.assert_array_equal(memory, expected)


REFUSED = {
    "negative offset": dict(offset=[-UNIT]),
    "no length": dict(length=[0]),
    "beyond 63 bits": dict(offset=[2**63 - UNIT]),
    "sum too small": dict(iov_length=[UNIT // 2]),
    "sum too large": dict(iov_length=[2 * UNIT]),
    "negative destination": dict(iov_length=[-UNIT]),
    "no destination": dict(iov_start=[0, 0]),
    "start outside": dict(iov_start=[0, 2]),
    "start descends": dict(iov_start=[1, 0]),
    "negative start": dict(iov_start=[-1, 1]),
    "checks outside": dict(check_start=[0, 1]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_a_batch_that_breaks_the_rules(storage, case):
    memory = room(2 * UNIT)
    good = ReadBatch.plain([0], [UNIT], [memory.ctypes.data])
    fields = dict(zip(good.__dataclass_fields__, good.arrays(), strict=True))
    for field, value in REFUSED[case].items():
        fields[field] = np.array(value, fields[field].dtype)
    with pytest.raises(UsageError, match="extent 0"):
        storage.submit(ReadBatch(**fields))
    assert storage.stats()["n_reads"] == 0


@pytest.mark.parametrize("field", ["offset", "iov_address", "check_digest", "iov_start"])
def test_refuses_arrays_of_a_wrong_kind(storage, field):
    memory = room(UNIT)
    good = ReadBatch.plain([0], [UNIT], [memory.ctypes.data], seed=[0], digest=[0])
    fields = dict(zip(good.__dataclass_fields__, good.arrays(), strict=True))
    for bad in (fields[field].astype(np.float64), fields[field][:0], None):
        with pytest.raises(UsageError, match=field):
            storage.submit(ReadBatch(**{**fields, field: bad}))


def test_direct_refuses_what_is_off_the_alignment(path):
    with opened("direct", path) as storage:
        a = storage.alignment
        memory = room(2 * UNIT)
        at = memory.ctypes.data
        for offset, length, address in ((a // 2, UNIT, at), (0, a // 2, at), (0, UNIT, at + 1)):
            with pytest.raises(UsageError, match="alignment"):
                storage.submit(ReadBatch.plain([offset], [length], [address]))


# ------------------------------------------------------------------------------- plain reading

READS = [(0, 0), (0, 1), (1, 511), (513, 4096), (4095, 2), (2 * UNIT, UNIT), (777, UNIT * 500)]


def test_reads_bytes_of_any_alignment(storage, content):
    for offset, length in [*READS, (len(content) - 3, 3), (len(content), 0), (0, len(content))]:
        assert storage.read(offset, length) == content[offset : offset + length].tobytes()


def test_refuses_to_read_beyond_the_end_before_allocating(storage, content):
    for offset, length in ((len(content) - 3, 4), (len(content) + 1, 0), (2**61, 2**29)):
        with pytest.raises(FlashReadError) as raised:
            storage.read(offset, length)
        assert raised.value.errno == errno.ENODATA
    for offset, length in ((-1, 4), (0, -1), (0, 2**40), (2**63, 1)):
        with pytest.raises(UsageError):
            storage.read(offset, length)


def test_an_empty_file_opens_and_has_nothing(name, tmp_path):
    path = tmp_path / "empty"
    path.touch()
    with opened(name, path) as storage:
        assert storage.size == 0 and storage.read(0, 0) == b""
        memory = room(UNIT)
        with (
            storage.submit(ReadBatch.plain([0], [UNIT], [memory.ctypes.data])) as ticket,
            pytest.raises(FlashReadError),
        ):
            ticket.wait()


def test_offsets_beyond_four_gib(name, tmp_path):
    path = tmp_path / "sparse.bin"
    offsets = np.array([2**31, 2**32 - UNIT, 2**32 + UNIT, 5 * 2**30], np.int64)
    with open(path, "wb") as file:
        for k, offset in enumerate(offsets):
            file.seek(offset)
            file.write(bytes([k + 1]) * UNIT)
    with opened(name, path) as storage:
        memory = room(4 * UNIT)
        batch = ReadBatch.plain(offsets, np.full(4, UNIT), memory.ctypes.data + np.arange(4) * UNIT)
        with storage.submit(batch) as ticket:
            ticket.wait()
        assert memory.reshape(4, UNIT).min(1).tolist() == [1, 2, 3, 4]
        assert memory.reshape(4, UNIT).max(1).tolist() == [1, 2, 3, 4]
        assert storage.read(int(offsets[3]) + 10, 5) == b"\x04" * 5


# ------------------------------------------------------------------------------------ lifetime


@pytest.mark.parametrize("name", STORAGES.names())
def test_page_cache_in_passing_for_a_ledger(name):
    sizes = (UNIT, 1 << 20, (2 << 20) + 2)
    mib = [STORAGES[name].cached_bytes(4, n) / 2**20 for n in sizes]
    if name == "pread":
        assert mib == [4 * (n + 2 * mmap.PAGESIZE) / 2**20 for n in sizes]
    else:  # of a mapping: 8 blocks, or those that four extents lie in, and what is advised ahead
        assert mib == {"direct": [0, 0, 0], "mmap": [24, 24, 32]}[name]


def test_closing_with_reads_in_flight(name, path, content):
    storage = opened(name, path, depth=2)
    batch, memory, _ = scattered(content, storage, 3)
    tickets = [storage.submit(batch) for _ in range(50)]
    storage.close()
    storage.close()
    seen = []
    for ticket in tickets:
        done = ticket.done()
        ticket.wait(done)
        if done < len(batch):
            with pytest.raises(ClosedError):
                ticket.wait()
        seen.append(done)
        ticket.close()
        ticket.close()
    assert sum(seen) < 50 * len(batch)  # submitting is quick: it cannot have read everything


def test_closing_a_ticket_drops_what_has_not_begun(name, path, content):
    with opened(name, path, depth=1) as storage:
        batch, memory, _ = scattered(content, storage, 5)
        ticket = storage.submit(batch)
        ticket.close()
        settled = memory.copy()
        n_reads = storage.stats()["n_reads"]
        other, memory_2, expected = scattered(content, storage, 6)
        with storage.submit(other) as second:
            second.wait()
        np.testing.assert_array_equal(memory_2, expected)
        np.testing.assert_array_equal(memory, settled)
        assert storage.stats()["n_reads"] == n_reads + len(other)


def test_closing_wakes_those_who_wait(name, path, content):
    storage = opened(name, path, depth=1)
    batch, memory, _ = scattered(content, storage, 5)
    tickets = [storage.submit(batch) for _ in range(20)]
    outcome = []

    def wait():
        try:
            tickets[-1].wait()
            outcome.append("arrived")
        except ClosedError:
            outcome.append("closed")

    waiter = threading.Thread(target=wait)
    waiter.start()
    storage.close()
    waiter.join(patience(10))
    assert outcome in (["closed"], ["arrived"])


def test_a_closed_storage_says_so(storage):
    storage.close()
    memory = room(UNIT)
    for use in (
        lambda: storage.submit(ReadBatch.plain([0], [UNIT], [memory.ctypes.data])),
        lambda: storage.read(0, 10),
        storage.fileno,
    ):
        with pytest.raises(ClosedError, match="closed"):
            use()


def test_wait_knows_its_bounds(storage, content):
    batch, memory, _ = scattered(content, storage, 8)
    with storage.submit(batch) as ticket:
        for upto in (-1, len(batch) + 1):
            with pytest.raises(UsageError):
                ticket.wait(upto)


def test_a_deleted_ticket_leaves_nothing_in_flight(name, path, content):
    with opened(name, path) as storage:
        batch, memory, _ = scattered(content, storage, 9)
        ticket = storage.submit(batch)
        del ticket
        settled = memory.copy()
        storage.read(0, 10)
        np.testing.assert_array_equal(memory, settled)


def test_a_forked_child_is_told(storage, content):
    batch, memory, _ = scattered(content, storage, 9)
    with storage.submit(batch) as ticket:
        ticket.wait()
        child = os.fork()
        if child == 0:
            told = 0
            for use in (lambda: storage.submit(batch), lambda: storage.read(0, 8), ticket.wait):
                try:
                    use()
                except ClosedError as error:
                    told += "fork" in str(error)
            ticket.close()
            storage.close()
            os._exit(0 if told == 3 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        ticket.wait()
    assert storage.read(0, 8) == content[:8].tobytes()


# ------------------------------------------------------------------------------------- opening


def test_unknown_backend(path):
    with pytest.raises(UnknownNameError, match="direct, mmap, pread"):
        open_storage("floppy", path)


def test_refuses_what_is_not_a_regular_file(name, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    for path, kind in (
        (tmp_path, "a directory"),
        (tmp_path / "fifo", "a FIFO"),
        ("/dev/null", "a character device"),
    ):
        with pytest.raises(FormatError, match=kind):
            opened(name, path)
    for path, code in ((tmp_path / "none", errno.ENOENT), (tmp_path / "loop", errno.ELOOP)):
        with pytest.raises(FlashReadError) as raised:
            opened(name, path)
        assert raised.value.errno == code
    for path in (3, "a\0b"):
        with pytest.raises(UsageError):
            opened(name, path)
    for depth in (0, 257, "4"):
        with pytest.raises(UsageError):
            opened(name, tmp_path, depth=depth)


def test_direct_is_refused_where_there_is_none():
    path = "/proc/version"  # a regular file of a file system that has no O_DIRECT
    with pytest.raises(UnsupportedError, match=f"{path}.*O_DIRECT"):
        open_storage("direct", path)


def test_descriptors_are_given_back(name, path):
    opened(name, path).close()
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        storage = opened(name, path)
        storage.read(0, 10)
        storage.close()
    with pytest.raises(FormatError):
        opened(name, path.parent)
    assert sorted(os.listdir("/proc/self/fd")) == before


# --------------------------------------------------------------------------------- page cache


def cached_bytes(path):
    """By mincore over a mapping of the whole file: the kernel's own word, not the reader's."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = os.path.getsize(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapping:
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        state = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        pointer = ctypes.c_void_p(address)
        assert libc.mincore(pointer, ctypes.c_size_t(size), state) == 0
        return mmap.PAGESIZE * sum(byte & 1 for byte in state)


def test_leaves_little_in_the_page_cache(name, tmp_path, content):
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        for _ in range(10):
            file.write(content[: N_UNITS * UNIT].tobytes())
    make_cold(path)
    if cached_bytes(path):
        pytest.skip("pages of this file system cannot be evicted or counted")
    with opened(name, path) as storage:
        length = 7 * 512  # neighbours share OS pages
        n = storage.size // length
        memory = room(n * length)
        offsets = np.arange(n) * length
        with storage.submit(
            ReadBatch.plain(offsets, np.full(n, length), memory.ctypes.data + offsets)
        ) as ticket:
            ticket.wait()
        expected = np.resize(content[: N_UNITS * UNIT], n * length)
        np.testing.assert_array_equal(memory, expected)
        # Pages shared by extents in flight may survive both, and on a busy machine an advised run
        # may arrive after it was dropped: far below the 24 MB read all the same.
        assert cached_bytes(path) < (mmap.PAGESIZE if name in ("direct", "ring") else 12 << 20)
        storage.read(100, 8 << 20)
        assert cached_bytes(path) < (mmap.PAGESIZE if name in ("direct", "ring") else 12 << 20)


def test_only_mmap_maps_the_file(name, path):
    """A mapping counts as resident memory and faults when the file shrinks."""
    with opened(name, path) as storage:
        storage.read(0, 512)
        with open("/proc/self/maps") as maps:
            mapped = os.path.realpath(path) in maps.read()
    assert mapped == (name == "mmap")
