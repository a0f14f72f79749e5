"""How fast this machine's processors read memory: the roof under which decoding lies.

Read where it is asked to, so that measuring costs no memory of its own; about 30 ms, once per
engine at its first request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from ..units import MIB

# Beyond the second-level caches; a last-level cache that holds all of a model is its true roof.
MOST_BYTES = 128 * MIB
LEAST_BYTES = 32 * MIB  # beside which starting a thread, 0.1 ms, is little
REPEATS = 3


def read_bytes_per_s(memory: Sequence[np.ndarray], *, n_threads: int) -> float | None:
    """The best rate at which one thread, or `n_threads`, read uint8 arrays, MOST_BYTES of them at
    most; None where there is nothing to read.

    NumPy's maximum over 64-bit words reads at the speed of memory: 25 to 30 GB/s in one thread and
    40 in two, on a machine where loops in C reach 30 to 33 and 40.
    """
    words, left = [], MOST_BYTES // 8
    for array in memory:
        words.append(array[: array.nbytes // 8 * 8].view(np.uint64)[:left])
        left -= words[-1].size
    n_bytes = 8 * (MOST_BYTES // 8 - left)
    if not n_bytes:
        return None
    passes = -(-LEAST_BYTES // n_bytes)
    seconds = []
    for n in sorted({1, n_threads}):  # of what fits a cache, one thread may read more than several
        work = [[np.array_split(array, n)[i] for array in words] * passes for i in range(n)]
        try:
            seconds += [_read(work) for _ in range(REPEATS)]
        except RuntimeError:  # no thread to be had: one thread's rate, and nobody's result is lost
            break
    return passes * n_bytes / min(seconds)


def _read(work: list[list[np.ndarray]]) -> float:
    """Seconds until every thread has read its arrays; the caller is the first thread."""
    threads = [threading.Thread(target=_largest, args=(arrays,)) for arrays in work[1:]]
    started: list[threading.Thread] = []
    start = time.perf_counter()
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
        _largest(work[0])
    finally:
        for thread in started:
            thread.join()
    return time.perf_counter() - start


def _largest(arrays: list[np.ndarray]) -> None:
    for array in arrays:
        if array.size:
            array.max()
