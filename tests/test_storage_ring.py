"""Reads through a ring of io_uring: who chooses it, and that it gives what threads give.

That it keeps the storage contract is test_storage_contract.py's; here is what only a ring has.
"""

from __future__ import annotations

import mmap
import os
import resource

import numpy as np
import pytest

from flashllm.errors import UnknownNameError, UnsupportedError
from flashllm.storage import ReadBatch, open_storage

from .readers import opened

UNIT = 4096


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(3).integers(0, 256, 2048 * UNIT, np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("ring") / "content"
    path.write_bytes(content.tobytes())
    return path


def room(n_bytes):
    return np.frombuffer(mmap.mmap(-1, n_bytes), np.uint8)


def test_engines_have_names(path):
    with pytest.raises(UnknownNameError, match="threads, uring"):
        open_storage("pread", path, engine="aio")
    for reader, engine in (("ring", "uring"), ("direct", "threads")):
        with opened(reader, path) as storage:
            assert storage.engine == engine


@pytest.mark.parametrize("name", ["pread", "mmap"])
def test_a_ring_does_not_read_through_the_page_cache(name, path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UnsupportedError, match=f"uring: storage {name}"):
        open_storage(name, path, engine="uring")
    assert len(os.listdir("/proc/self/fd")) == before


def test_where_no_ring_can_be_had(path):
    """No descriptor is left for one: who asked for it is refused, and leaves none behind."""
    opened("ring", path).close()
    lowest = os.dup(0)
    os.close(lowest)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, limits[1]))
    try:
        with pytest.raises(UnsupportedError, match=r"uring.*Too many open files"):
            open_storage("direct", path, engine="uring")
        open_storage("direct", path).close()  # the descriptor was given back
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def mixed(content, memory, seed):
    """Extents of 1 unit to 1 MiB, of up to 30 destinations, and the bytes they should bring."""
    rng = np.random.default_rng(seed)
    units = rng.choice([1, 2, 3, 16, 256], 40, p=[0.3, 0.3, 0.2, 0.15, 0.05])
    first = np.array([rng.integers(0, 2048 - n) for n in units])
    pieces = [np.sort(rng.choice(n, min(n, rng.integers(1, 31)), replace=False)) for n in units]
    for cuts in pieces:
        cuts[0] = 0
    lengths = [np.diff([*cuts, n]) for cuts, n in zip(pieces, units, strict=True)]
    flat = np.concatenate(lengths) * UNIT
    ends = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]).astype(np.int32)
    spots = rng.permutation(len(flat))
    places = np.empty(len(flat), np.int64)
    places[spots] = np.cumsum(flat[spots]) - flat[spots]
    source = np.concatenate(
        [(f + cuts) * UNIT for f, cuts in zip(first, pieces, strict=True)])  # fmt: skip
    expected = np.zeros_like(memory)
    for at, start, n in zip(places, source, flat, strict=True):
        expected[at : at + n] = content[start : start + n]
    none = np.empty(0, np.uint64)
    batch = ReadBatch(
        first * UNIT, units * UNIT, ends, (memory.ctypes.data + places).astype(np.uint64), flat,
        np.zeros_like(ends), none, none.astype(np.int64), none, none,
    )  # fmt: skip
    batch.validate()
    return batch, expected


@pytest.mark.parametrize("depth", [1, 3, 16])
def test_long_and_brief_reads_of_many_batches(path, content, depth):
    """Some batches are closed early; those behind them arrive all the same."""
    with opened("ring", path, depth=depth) as storage:
        memories = [room(16 << 20) for _ in range(3)]
        for seed in range(4):
            some = [mixed(content, memory, 10 * seed + k) for k, memory in enumerate(memories)]
            tickets = [storage.submit(batch) for batch, _ in some]
            tickets[seed % 3].close()
            for k, (ticket, (_, expected)) in enumerate(zip(tickets, some, strict=True)):
                if k != seed % 3:
                    ticket.wait()
                    assert (memories[k][: len(expected)] == expected).all()
                    ticket.close()
                memories[k][:] = 0
        assert storage.stats()["n_retries"] == 0


def rings():
    """Descriptors of rings that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if "io_uring" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
        except OSError:  # the listing's own
            continue
    return found


@pytest.mark.parametrize("when", ["before the first read", "later"])
def test_a_ring_that_stops_working(path, content, when):
    """Its descriptor is another file: threads read what the kernel will not take."""
    before = rings()
    with opened("ring", path, depth=4) as storage:
        (fd,) = rings() - before
        memory = room(16 << 20)
        batch, expected = mixed(content, memory, 5)
        for broken in (when == "before the first read", True):
            if broken:
                other = os.open("/dev/null", os.O_RDONLY)
                os.dup2(other, fd)
                os.close(other)
            memory[:] = 0
            with storage.submit(batch) as ticket:
                ticket.wait()
            assert (memory == expected).all()
