"""How fast and at what cost each storage backend reads a file, cold.

    python bench/reading.py FILE [--repeats 3] [--depth N] [--mib 128]

FILE should be larger than 256 MiB and lie on the device in question; it is only read.  Backends
are interleaved, each round reads other places, and the file is evicted before each reading.
`ring` is `direct` by the I/O engine uring.  Printed per size and backend: operations a second,
median MB/s (lowest-highest), CPU seconds per GB, page cache left.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import time

import numpy as np

from flashllm.errors import UnsupportedError
from flashllm.storage import ReadBatch, open_storage, resident_bytes
from flashllm.stress.confine import make_cold
from flashllm.units import KIB, MIB, format_size

SIZES = (8 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB)
# name -> (storage, io_engine)
READERS = {
    "direct": ("direct", "threads"), "ring": ("direct", "uring"), "pread": ("pread", "threads"),
    "mmap": ("mmap", "threads"),
}  # fmt: skip


def measure(name: str, path: str, size: int, *, depth: int | None, n_bytes: int, seed: int):
    """(seconds, CPU seconds, bytes read, page cache left) of reads at sorted random places."""
    places = os.path.getsize(path) // size
    n = min(n_bytes // size, places)
    offsets = np.sort(np.random.default_rng(seed).choice(places, n, replace=False)) * size
    room = np.frombuffer(mmap.mmap(-1, n * size), np.uint8)
    room[::4096] = 1  # touched: the device is timed, not the first touch of memory
    batch = ReadBatch.plain(offsets, np.full(n, size), room.ctypes.data + np.arange(n) * size)
    if left := make_cold(path):
        raise SystemExit(f"{format_size(left)} of {path} cannot be evicted: is it mapped?")
    storage, engine = READERS[name]
    with open_storage(storage, path, depth=depth, engine=engine) as storage:
        start, cpu = time.perf_counter(), time.process_time()
        with storage.submit(batch) as ticket:
            ticket.wait()
        elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
        left = resident_bytes(storage.fileno(), 0, storage.size)
        return elapsed, cpu, storage.stats()["bytes_read"], left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depth", type=int, help="reads in flight; default: the engine's own")
    parser.add_argument("--mib", type=int, default=128, help="read per measurement")
    options = parser.parse_args()
    results: dict[tuple[int, str], list] = {}
    for repeat in range(options.repeats):
        for size in SIZES:
            for name in READERS:
                try:
                    one = measure(
                        name,
                        options.file,
                        size,
                        depth=options.depth,
                        n_bytes=options.mib * MIB,
                        seed=repeat,
                    )
                except UnsupportedError as error:
                    print(f"{name}: {error}")
                    continue
                results.setdefault((size, name), []).append(one)
    for (size, name), runs in sorted(results.items()):
        ops = statistics.median(n_bytes / size / elapsed for elapsed, _, n_bytes, _ in runs)
        rates = [n_bytes / elapsed / 1e6 for elapsed, _, n_bytes, _ in runs]
        cpu = sum(run[1] for run in runs) / sum(run[2] for run in runs) * 1e9
        left = max(run[3] for run in runs)
        print(
            f"{format_size(size):>9}  {name:6}  {ops:6.0f} op/s  "
            f"{statistics.median(rates):6.0f} MB/s ({min(rates):.0f}-{max(rates):.0f})  "
            f"{cpu:.2f} CPU s/GB  {format_size(left)} cached"
        )


if __name__ == "__main__":
    main()
