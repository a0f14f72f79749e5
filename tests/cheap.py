"""Refusing a hostile file must cost at most a second and 16 MiB."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from flashllm.probe.process import process_memory

MOST_BYTES, MOST_S = 16 * 2**20, 1.0


def refused(
    kinds: type[Exception] | tuple[type[Exception], ...], action: Callable[[], object],
    match: str | None = None,
) -> Exception:  # fmt: skip
    """The error, one of `kinds`, that `action` raises twice: once for its time and for the pages
    that the process takes, libraries in C included, and once for what Python allocates, which
    makes everything slower.  Time is the processor's: the machine may be busy with others."""
    forget_peak()
    before, started = process_memory().rss, time.process_time()
    with pytest.raises(kinds, match=match) as caught:
        action()
    seconds, grown = time.process_time() - started, process_memory().peak_rss - before
    tracemalloc.start()
    try:
        with pytest.raises(kinds):
            action()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < MOST_S, f"{seconds:.2f} s"
    assert max(grown, peak) < MOST_BYTES, f"{grown} bytes of pages, {peak} of Python's"
    return caught.value


def forget_peak() -> None:
    """The most that this process ever held is what it holds now, where the kernel can forget."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
