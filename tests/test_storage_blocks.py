"""Large extents of a mapping: read in blocks of 2 MiB that leave the page cache again."""

from __future__ import annotations

import errno
import mmap
import os

import numpy as np
import pytest
from flashllm._core import resident_bytes

from flashllm.errors import FlashReadError
from flashllm.storage import ReadBatch, open_storage
from flashllm.stress.confine import make_cold, make_warm

MIB = 1 << 20
N_BYTES = 41 * MIB + 12345


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(11).integers(0, 256, N_BYTES, np.uint8)


@pytest.fixture
def path(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content.tobytes())
    make_cold(path)
    return path


def extents(size, *, start=777):
    """(offsets, lengths): one behind the other, across block boundaries, to the file's end."""
    offsets = np.arange(start, N_BYTES, size)
    return offsets, np.minimum(size, N_BYTES - offsets)


@pytest.mark.parametrize("size", [512 * 1024, MIB, 3 * MIB + 5])
def test_every_byte_arrives_and_few_blocks_stay(path, content, size):
    offsets, lengths = extents(size)
    memory = np.frombuffer(mmap.mmap(-1, N_BYTES), np.uint8)
    with open_storage("mmap", path, depth=4) as storage:
        for _ in range(2):  # the second time around the same blocks are asked for again
            memory[:] = 0
            batch = ReadBatch.plain(offsets, lengths, memory.ctypes.data + offsets)
            with storage.submit(batch) as ticket:
                ticket.wait()
            assert np.array_equal(memory[777:], content[777:])
            assert resident_bytes(storage.fileno(), 0, N_BYTES) <= storage.cached_bytes(4, size)
    with open(path, "rb") as file:
        assert resident_bytes(file.fileno(), 0, N_BYTES) <= 2 * MIB  # a last, shared block


def test_extents_here_and_there(path, content):
    offsets = np.random.default_rng(3).permutation(39)[:25] * MIB
    memory = np.frombuffer(mmap.mmap(-1, 25 * MIB), np.uint8)
    with open_storage("mmap", path, depth=4) as storage:
        batch = ReadBatch.plain(offsets, [MIB] * 25, memory.ctypes.data + MIB * np.arange(25))
        with storage.submit(batch) as ticket:
            ticket.wait()
        for i, offset in enumerate(offsets):
            assert np.array_equal(memory[i * MIB : (i + 1) * MIB], content[offset : offset + MIB])
        assert resident_bytes(storage.fileno(), 0, N_BYTES) <= storage.cached_bytes(4, MIB)


def mapped_bytes(path):
    """Resident bytes of all mappings of the file in this process."""
    n_bytes, is_it = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.split(maxsplit=1)[0]:
                is_it = line.rstrip().endswith(os.path.realpath(path))
            elif is_it and line.startswith("Rss:"):
                n_bytes += int(line.split()[1]) * 1024
    return n_bytes


def blocks_in_memory(path):
    """Bring the file into the page cache as whole blocks, where the kernel can."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_RANDOM):
            mapping.madvise(advice)
        assert len(bytes(mapping)) == N_BYTES


# What one fault maps of a cached file: 64 KiB around it, or all of a block.
@pytest.mark.parametrize("cached", [make_warm, blocks_in_memory])
@pytest.mark.parametrize("size, most", [(4096, 0), (100_000, 0), (512 * 1024, 16), (MIB, 16)])
def test_no_more_of_a_warm_file_is_mapped_than_counted(path, content, cached, size, most):
    cached(path)
    offsets = np.random.default_rng(5).permutation(N_BYTES // size - 1)[:600] * size + 777
    n, peak = len(offsets), 0
    memory = np.frombuffer(mmap.mmap(-1, N_BYTES), np.uint8)
    batch = ReadBatch.plain(offsets, np.full(n, size), memory.ctypes.data + offsets)
    with open_storage("mmap", path, depth=4) as storage:
        with storage.submit(batch) as ticket:
            while ticket.done() < n:
                peak = max(peak, mapped_bytes(path))
            ticket.wait()
        assert peak <= storage.cached_bytes(4, size) - 8 * MIB  # which are advised, not mapped
        assert mapped_bytes(path) <= most * MIB
    for offset in offsets:
        assert np.array_equal(memory[offset : offset + size], content[offset : offset + size])


def test_a_file_cut_short_is_an_error_and_no_signal(path):
    memory = np.frombuffer(mmap.mmap(-1, MIB), np.uint8)
    with open_storage("mmap", path, depth=2) as storage:
        for offset, fails in ((0, False), (30 * MIB, True), (MIB, False)):
            if fails:
                os.truncate(path, 20 * MIB)
            with storage.submit(ReadBatch.plain([offset], [MIB], [memory.ctypes.data])) as ticket:
                if not fails:
                    ticket.wait()
                    continue
                with pytest.raises(FlashReadError) as caught:
                    ticket.wait()
                assert caught.value.errno == errno.ENODATA
