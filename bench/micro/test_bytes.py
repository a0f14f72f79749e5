"""Codecs beside memcpy, checksums too, and readers beside a plain O_DIRECT loop."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from flashllm import _core
from flashllm.container.base import CODECS
from flashllm.errors import UnsupportedError
from flashllm.quant import WEIGHT_TYPES
from flashllm.storage import ReadBatch, open_storage
from flashllm.units import KIB, MIB

FRAME = 64 * KIB
READERS = [("direct", "threads"), ("direct", "uring"), ("pread", "threads"), ("mmap", "threads")]
FILE_BYTES, READ_BYTES = 128 * MIB, 8 * MIB


def frame_of(weight_type: str) -> bytes:
    """A frame of normal weights, as containers hold them."""
    rows = np.random.default_rng(0).standard_normal((64, 512), dtype=np.float32)
    return WEIGHT_TYPES[weight_type].encode(rows).tobytes()[:FRAME]


@pytest.mark.parametrize("weight_type", ["bf16", "int8"])
@pytest.mark.parametrize("name", list(CODECS))
def test_decode(name, weight_type, against):
    codec = CODECS[name]
    if not codec.accepts([weight_type]):
        pytest.skip(f"{name} does not code {weight_type}")
    frame = frame_of(weight_type)
    stored = bytes(codec.encoder().encode(frame))
    decoder, out = codec.decoder(), bytearray(len(frame))
    target = np.empty(len(frame), np.uint8)
    source = np.frombuffer(frame, np.uint8)
    against(lambda: decoder.decode_into(stored, out), lambda: np.copyto(target, source), "memcpy",
            n_bytes=len(frame))  # fmt: skip


def test_checksum(against):
    data = np.frombuffer(frame_of("bf16"), np.uint8)
    target = np.empty_like(data)
    against(lambda: _core.xxh64(data, 0), lambda: np.copyto(target, data), "memcpy",
            n_bytes=data.nbytes)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Noise on the disk that FLASHLLM_BENCH_DIR, or the temporary folder, lies on."""
    folder = os.environ.get("FLASHLLM_BENCH_DIR") or tmp_path_factory.mktemp("micro")
    path = os.path.join(folder, "flashllm-micro.bin")
    rng = np.random.default_rng(0)
    with open(path, "wb") as out:
        for _ in range(FILE_BYTES // MIB):
            out.write(rng.integers(0, 256, MIB, np.uint8).tobytes())
        out.flush()
        os.fsync(out.fileno())
    yield path
    os.remove(path)


@pytest.mark.parametrize("size", [8 * KIB, 16 * KIB, 256 * KIB])
@pytest.mark.parametrize("name, engine", READERS)
def test_read(name, engine, size, file, against):
    n = READ_BYTES // size
    rng, room = np.random.default_rng(1), np.frombuffer(mmap.mmap(-1, READ_BYTES), np.uint8)
    room[::4096] = 1
    addresses = room.ctypes.data + np.arange(n) * size
    try:
        storage = open_storage(name, file, engine=engine)
        direct = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except (UnsupportedError, OSError, AttributeError) as error:
        pytest.skip(str(error))

    def places() -> np.ndarray:
        os.posix_fadvise(direct, 0, 0, os.POSIX_FADV_DONTNEED)
        return np.sort(rng.choice(FILE_BYTES // size, n, replace=False)) * size

    def ours() -> None:
        batch = ReadBatch.plain(places(), np.full(n, size), addresses)
        with storage.submit(batch) as ticket:
            ticket.wait()

    def one_by_one() -> None:
        for i, offset in enumerate(places().tolist()):
            os.preadv(direct, [room[i * size : (i + 1) * size]], offset)

    with storage:
        against(ours, one_by_one, "plain O_DIRECT loop", n_bytes=READ_BYTES)
    os.close(direct)
