"""Micro-benchmarks as ratios to a named baseline on the same machine, so that numbers travel.

    make bench                                   # all of them, a table, and a JSON file
    pytest bench/micro -k kernels --benchmark-compare

Each result carries in extra_info: `baseline` (its name), `baseline_s`, and `ratio` = the baseline's
time over ours, 1.0 being as fast, more being faster.  A ratio that falls shows a regression on any
machine; the baseline is timed before and after, and the better counts.  Not part of the tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

ROUND_S = 2e-3  # a round repeats its call until it lasts this long: the clock is then no matter
ROUNDS = 15
_ratios: list[tuple[str, str, float, float]] = []


def round_s(run: Callable[[], object]) -> tuple[float, int]:
    """(least seconds of one call over several rounds, calls per round)."""
    run()
    start = time.perf_counter()
    run()
    n = max(1, round(ROUND_S / max(time.perf_counter() - start, 1e-7)))
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(n):
            run()
        best = min(best, (time.perf_counter() - start) / n)
    return best, n


@pytest.fixture
def against(benchmark, request):
    """against(run, baseline, named, n_bytes=…): benchmark `run`, and `baseline` beside it."""

    def measure(
        run: Callable[[], object], baseline: Callable[[], object], named: str, *, n_bytes: int = 0
    ) -> None:
        if benchmark.disabled:  # --benchmark-disable: does everything still run?
            benchmark(run)
            baseline()
            return
        before, _ = round_s(baseline)
        _, n = round_s(run)
        benchmark.pedantic(run, rounds=ROUNDS, iterations=n, warmup_rounds=1)
        after, _ = round_s(baseline)
        base, mine = min(before, after), benchmark.stats.stats.min
        benchmark.extra_info.update(baseline=named, baseline_s=base, ratio=base / mine)
        if n_bytes:
            benchmark.extra_info["bytes_per_s"] = n_bytes / mine
        _ratios.append((request.node.name, named, base / mine, n_bytes / mine / 1e9))

    return measure


def pytest_terminal_summary(terminalreporter) -> None:
    if not _ratios:
        return
    terminalreporter.section("times faster than the baseline")
    for name, named, ratio, rate in _ratios:
        speed = f"{rate:8.1f} GB/s" if rate else ""
        terminalreporter.write_line(f"{ratio:8.3g}x  {name:<52} {named:<34} {speed}")
