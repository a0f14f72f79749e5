"""What SlowStorage and FaultyStorage add to the contract, on a clock of our own."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from flashllm._core import xxh64

from flashllm.errors import ChecksumError, FlashReadError, UsageError
from flashllm.storage import ReadBatch, open_storage
from flashllm.storage.wrappers import FaultyStorage, SlowStorage

UNIT, N = 4096, 16


@pytest.fixture
def inner(tmp_path):
    path = tmp_path / "content.bin"
    path.write_bytes(np.random.default_rng(3).bytes(N * UNIT))
    with open_storage("pread", path) as storage:
        yield storage


def whole(storage, *, checked):
    memory = np.zeros(N * UNIT, np.uint8)
    offsets = np.arange(N) * UNIT
    digest = [xxh64(storage.read(int(o), UNIT), 9) for o in offsets] if checked else None
    lengths = np.full(N, UNIT)
    address = memory.ctypes.data + offsets
    batch = ReadBatch.plain(
        offsets,
        lengths,
        address,
        seed=np.full(N, 9),
        digest=None if digest is None else np.array(digest, np.uint64),
    )
    return batch, memory


class Clock:
    def __init__(self):
        self.now, self.slept = 100.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def test_a_slow_device_serves_in_order_at_its_price(inner):
    clock = Clock()
    slow = SlowStorage(
        inner, seconds_per_read=0.5, bytes_per_s=UNIT / 1.5, clock=clock, sleep=clock.sleep
    )
    batch, memory = whole(inner, checked=False)
    first, second = slow.submit(batch), slow.submit(batch)
    assert first.done() == 0
    first.wait(3)
    assert clock.now == pytest.approx(106.0) and first.done() == 3 and second.done() == 0
    first.wait(2)
    assert clock.now == pytest.approx(106.0)
    second.wait(1)
    first.wait()  # its price is paid; the real reads below may still be on their way
    assert clock.now == pytest.approx(100 + 2 * N + 2) and first.done() == N
    clock.now += 1000
    second.wait()
    assert len(clock.slept) == 2
    slow.read(0, UNIT)
    assert clock.slept[-1] == pytest.approx(2.0)
    for ticket in (first, second):
        ticket.close()


def test_a_closed_batch_frees_a_slow_device(inner):
    clock = Clock()
    slow = SlowStorage(inner, seconds_per_read=1.0, clock=clock, sleep=clock.sleep)
    batch, memory = whole(inner, checked=False)
    ticket = slow.submit(batch)
    ticket.wait(3)
    clock.now += 0.5
    ticket.close()
    with slow.submit(batch) as ticket:
        ticket.wait(1)  # after the one that was in flight
    assert clock.now == pytest.approx(105.0)


@pytest.mark.parametrize("price", [dict(seconds_per_read=-1), dict(bytes_per_s=0)])
def test_a_slow_device_refuses_a_price_that_cannot_be(inner, price):
    with pytest.raises(UsageError):
        SlowStorage(inner, **price)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("fail", (FlashReadError, errno.EIO)),
        ("short", (FlashReadError, errno.ENODATA)),
        ("corrupt", (ChecksumError, None)),
    ],
)
def test_a_fault_breaks_its_extent_and_no_other(inner, kind, expected):
    error, code = expected
    faulty = FaultyStorage(inner, lambda ordinal, offset, length: kind if ordinal == 5 else None)
    batch, memory = whole(inner, checked=True)
    with faulty.submit(batch, lambda extent, check: f"frame {extent} ({check})") as ticket:
        ticket.wait(5)
        for _ in range(2):
            with pytest.raises(error, match="frame 5") as raised:
                ticket.wait()
            assert getattr(raised.value, "errno", None) == code
            assert ticket.done() == 5
    batch, memory = whole(inner, checked=True)
    with faulty.submit(batch) as ticket:  # the ordinal goes on: read again, it is whole
        ticket.wait()
        assert ticket.done() == N
    assert memory.tobytes() == inner.read(0, N * UNIT)


def test_unchecked_corruption_is_silent(inner):
    faulty = FaultyStorage(inner, lambda ordinal, offset, length: "corrupt" if ordinal else None)
    batch, memory = whole(inner, checked=False)
    with faulty.submit(batch) as ticket:
        ticket.wait()
        ticket.wait()
        assert ticket.done() == N
    truth = np.frombuffer(inner.read(0, N * UNIT), np.uint8)
    assert np.flatnonzero(memory != truth).tolist() == [k * UNIT for k in range(1, N)]


def test_faults_of_plain_reads(inner):
    kinds = iter(["fail", "short", "corrupt", None, "burn"])
    faulty = FaultyStorage(inner, lambda ordinal, offset, length: next(kinds))
    truth = inner.read(10, 20)
    for code in (errno.EIO, errno.ENODATA):
        with pytest.raises(FlashReadError) as raised:
            faulty.read(10, 20)
        assert raised.value.errno == code and raised.value.offset == 10
    assert faulty.read(10, 20) == bytes([truth[0] ^ 1]) + truth[1:]
    assert faulty.read(10, 20) == truth
    with pytest.raises(UsageError, match="burn"):
        faulty.read(10, 20)
