"""Long tests on request (`--long`), and what every run says at its end: how many of the tests that
need a special machine really ran."""

from __future__ import annotations

from collections import Counter

import pytest

SPECIAL = {"cgroup", "kernel"}  # markers; pyproject.toml says what each means


def pytest_addoption(parser) -> None:
    parser.addoption("--long", action="store_true", help="the long tests too, and more rounds")


def pytest_collection_modifyitems(config, items) -> None:
    if config.getoption("--long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def rounds(request):
    """rounds(usual, long): how often to repeat something random."""
    return lambda usual, long: long if request.config.getoption("--long") else usual


def pytest_terminal_summary(terminalreporter) -> None:
    ran, skipped = 0, Counter()
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if SPECIAL.isdisjoint(report.keywords):
                continue
            if outcome == "skipped":
                skipped[str(report.longrepr[-1]).removeprefix("Skipped: ")] += 1
            else:
                ran += 1
    if ran or skipped:
        n_skipped = sum(skipped.values())
        terminalreporter.write_line(
            f"tests that need root, cgroups, loop devices, FUSE, strace or emulation: {ran} ran, "
            f"{n_skipped} skipped"
        )
        for reason, n in skipped.most_common():
            terminalreporter.write_line(f"  {n} skipped: {reason}")
