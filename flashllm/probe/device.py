"""Measure the device under a file with real reads of that file, and choose how to read it.

Bounded: about 0.3 s and a few MiB per point, whatever the file; every point reads different places,
chosen by a seeded generator, so that no cache answers twice.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass

import numpy as np

from ..errors import UnsupportedError
from ..storage import ReadBatch, Storage, open_storage, resident_bytes
from ..units import KIB, MIB
from .curve import DEFAULT_CURVE, DeviceCurve, Point, best_curve

SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB)
DEPTHS = (1, 16)
POINT_BYTES = 2 * MIB  # in each of two passes


@dataclass(frozen=True)
class Choice:
    """A backend's name, the reason in words, and the curve of reading this file with it."""

    name: str
    why: str
    curve: DeviceCurve


def probe_device(
    path: str | os.PathLike, storage: str, *, seconds: float = 0.3, seed: int = 0,
    engine: str = "threads",
) -> DeviceCurve:  # fmt: skip
    """The curve of reading `path` with the backend `storage`, by the I/O engine `engine`.

    Everything is measured twice, as far as `seconds` go, and the lesser time taken: a stall of
    somebody else's making is no property of the device.  Sizes of which the file has too few
    places to keep a depth busy are left out, and so are the larger ones on a device so slow that
    `seconds` are over; a file too small for any gives DEFAULT_CURVE.
    """
    rng = np.random.default_rng(seed)
    # All reads land in the same memory: nobody looks at it, and a probe must not cost 16 MiB.
    room = np.frombuffer(mmap.mmap(-1, SIZES[-1]), np.uint8)
    name, started = f"probed ({storage})", time.perf_counter()
    points = _points(path, storage, engine, rng, room, seconds / 2)
    if not points:
        return DEFAULT_CURVE
    passes = [DeviceCurve(name, points)]
    if time.perf_counter() - started < seconds:  # else so slow that stalls hardly count
        passes.append(DeviceCurve(name, _points(path, storage, engine, rng, room, seconds / 2)))
    return DeviceCurve(name, best_curve(passes).points)


def _points(
    path, storage: str, engine: str, rng, room: np.ndarray, seconds: float
) -> tuple[Point, ...]:
    """One pass over depths and sizes."""
    points, per_depth = [], seconds / len(DEPTHS)
    for depth in DEPTHS:
        with open_storage(storage, path, depth=depth, engine=engine) as opened:
            n_ready = min(depth, opened.size // SIZES[0])
            _time(opened, np.zeros(n_ready, np.int64), SIZES[0], depth, room, per_depth)
            spent = 0.0
            for size in SIZES:
                places = opened.size // size
                n = min(places, max(POINT_BYTES // size, 2 * depth))
                if n < 2 * depth or spent > per_depth:
                    break
                offsets = rng.choice(places, n, replace=False) * size
                elapsed, n_read = _time(opened, offsets, size, depth, room, per_depth / len(SIZES))
                points.append(Point(depth, size, elapsed / n_read))
                spent += elapsed
    return tuple(points)


def _time(storage, offsets, size, depth, room, seconds) -> tuple[float, int]:
    """(elapsed seconds, reads) of reading at `offsets`, given up when `seconds` are over.

    The reads are dropped from the page cache first, or a warm file would be timed as RAM.
    """
    if storage.name != "direct":
        for offset in offsets.tolist():
            os.posix_fadvise(storage.fileno(), offset, size, os.POSIX_FADV_DONTNEED)
    n, elapsed, n_read = len(offsets), 0.0, 0
    batch = ReadBatch.plain(offsets, np.full(n, size), np.full(n, room.ctypes.data))
    start = time.perf_counter()
    with storage.submit(batch) as ticket:
        while n_read < n and elapsed < seconds:
            ticket.wait(min(n_read + depth, n))
            elapsed, n_read = time.perf_counter() - start, ticket.done()
    return elapsed, n_read


def _caching(storage: Storage) -> bool | None:
    """Whether direct reads of this file fill the page cache after all; None when it cannot be
    told, because the pages cannot be evicted (tmpfs, or another process maps the file)."""
    length = min(storage.size, 256 * KIB)
    fd = storage.fileno()
    os.posix_fadvise(fd, 0, length, os.POSIX_FADV_DONTNEED)
    if length == 0 or resident_bytes(fd, 0, length):
        return None
    storage.read(0, length)
    return resident_bytes(fd, 0, length) > 0


def choose_storage(
    path: str | os.PathLike, *, curve: DeviceCurve | None = None, engine: str = "threads"
) -> Choice:
    """How to read `path` on this machine: `direct` where it truly is, else the faster of the rest.

    `curve`, when given, is carried instead of probing speeds; `engine` is the I/O engine to read
    with.  Raises as open_storage does for a file that cannot be read at all, or not by `engine`.
    """
    try:
        with open_storage("direct", path, depth=1, engine=engine) as storage:
            caching, alignment = _caching(storage), storage.alignment
    except UnsupportedError as error:
        if engine == "uring":
            raise
        refusal = str(error)
    else:
        if not caching:
            seen = "page cache not checkable" if caching is None else "nothing in the page cache"
            found = curve or probe_device(path, "direct", engine=engine)
            why = f"O_DIRECT works ({alignment}-byte reads, {seen}), {_speed(found)}"
            return Choice("direct", why, found)
        refusal = "O_DIRECT is accepted but fills the page cache"
    if curve is not None:
        return Choice("pread", f"{refusal}; speeds not probed", curve)
    curves = {name: probe_device(path, name) for name in ("pread", "mmap")}
    name = max(curves, key=lambda name: curves[name].bytes_per_s(64 * KIB))
    speeds = ", ".join(f"{name} {_speed(found)}" for name, found in curves.items())
    return Choice(name, f"{refusal}; {speeds}", curves[name])


def _speed(curve: DeviceCurve) -> str:
    if curve is DEFAULT_CURVE:
        return "too small to probe"
    rates = (curve.bytes_per_s(size) / 1e6 for size in (16 * KIB, MIB))
    return "16 KiB at {:.0f} MB/s, 1 MiB at {:.0f} MB/s".format(*rates)
