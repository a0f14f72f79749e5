"""How fast this machine's processors read memory: the roof under which decoding lies.

Read where it is asked to, so that measuring costs no memory of its own; about 30 ms, once per
engine at its first request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from .._core import or_words
from ..units import MIB

MOST_BYTES = 128 * MIB  # at a time, beyond the second-level caches
LEAST_BYTES = 32 * MIB  # beside which starting a thread, 0.1 ms, is little
REPEATS = 3


def read_bytes_per_s(memory: Sequence[np.ndarray], *, n_threads: int) -> float | None:
    """The rate at which one thread, or `n_threads`, read uint8 arrays: of the faster the median.
    None where there is nothing to read.

    Each repeat reads on where the one before ended, as tokens come back to a weight after all
    others: a last-level cache that keeps a part of a model would answer for what was just read (on
    a Xeon with 480 MiB of it 36 GB/s, of memory 29), one that keeps all of it is the true roof.
    """
    words = [array[: array.nbytes // 8 * 8].view(np.uint64) for array in memory]
    n_words = sum(array.size for array in words)
    if not n_words:
        return None
    size, at, rates = min(n_words, MOST_BYTES // 8), 0, []
    passes = -(-LEAST_BYTES // (8 * size))
    for n in sorted({1, n_threads}):  # of what fits a cache, one thread may read more than several
        seconds = []
        for _ in range(REPEATS):
            part, at = _stretch(words, at, size), (at + size) % n_words
            work = [[np.array_split(array, n)[i] for array in part] * passes for i in range(n)]
            try:
                seconds.append(_read(work))
            except RuntimeError:  # no thread to be had: nobody loses a result by that
                break
        if seconds:
            rates.append(8 * size * passes / median(seconds))
    return max(rates, default=None)


def _stretch(words: list[np.ndarray], at: int, size: int) -> list[np.ndarray]:
    """`size` words from place `at` on, of all that lie one behind the other and begin again."""
    found, first = [], 0
    for array in words * 2:
        start, stop = max(at - first, 0), min(at + size - first, array.size)
        if start < stop:
            found.append(array[start:stop])
        first += array.size
    return found


def _read(work: list[list[np.ndarray]]) -> float:
    """Seconds until every thread has read its arrays; the caller is the first thread."""
    threads = [threading.Thread(target=_look_at, args=(arrays,)) for arrays in work[1:]]
    started: list[threading.Thread] = []
    start = time.perf_counter()
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
        _look_at(work[0])
    finally:
        for thread in started:
            thread.join()
    return time.perf_counter() - start


def _look_at(arrays: list[np.ndarray]) -> None:
    for array in arrays:
        or_words(array)
