"""The arena and the ledger."""

from __future__ import annotations

import numpy as np
import pytest

from flashllm.cache import Arena, Ledger, arena_bytes
from flashllm.errors import BudgetError, BusyError, ClosedError, UsageError


@pytest.mark.parametrize("huge_pages", [False, True])
def test_arena_regions(huge_pages):
    sizes = {"a": 1, "b": 4096, "empty": 0, "c": 5000}
    arena = Arena(sizes, huge_pages=huge_pages)
    assert arena.n_bytes == arena_bytes(sizes) == 4096 * 4
    arena.check()
    for region in arena.regions.values():
        assert region.address % 4096 == 0
    for name in ("a", "b", "c"):
        arena.view(arena[name].address, sizes[name])[:] = ord(name)
    for name in ("a", "b", "c"):
        assert (arena.view(arena[name].address, sizes[name]) == ord(name)).all()
    with pytest.raises(AssertionError, match="view of 4097"):
        arena.view(arena["c"].address + 4096, 4097)
    arena.close()
    arena.close()
    with pytest.raises(ClosedError):
        arena.view(arena.address, 1)


def test_arena_touches_everything_once():
    """The charge comes when the arena is made, not later: every page is resident at once."""

    def resident() -> int:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    before = resident()
    arena = Arena({"x": 64 << 20}, huge_pages=False)
    grown = resident() - before
    assert 63 << 20 <= grown <= 68 << 20
    arena.close()


def test_arena_does_not_close_while_leased():
    arena = Arena({"a": 10})
    arena.lease()
    with pytest.raises(BusyError, match="1 leases"):
        arena.close()
    arena.release()
    view = arena.view(arena.address, 10)
    arena.close()
    assert isinstance(view, np.ndarray) and view[0] == 0, "a view out keeps its memory"
    with pytest.raises(AssertionError):
        arena.release()


def test_arena_refuses_negative_sizes():
    with pytest.raises(UsageError, match="'a' of -1"):
        Arena({"a": -1})


def test_ledger_sums_to_the_budget():
    ledger = Ledger(10 << 20)
    ledger.charge("interpreter", 3 << 20, note="measured")
    ledger.charge("ring", 1000)
    ledger.require()
    ledger.grant("slots", 5 << 20)
    assert ledger.left_bytes == (2 << 20) - 1000
    with pytest.raises(AssertionError, match="sum to"):
        ledger.check()
    ledger.settle()
    ledger.check()
    assert sum(ledger.lines().values()) == 10 << 20
    text = ledger.render()
    assert text.splitlines()[0].split() == [
        *("interpreter", "3,145,728", "B", "3.00", "MiB", "measured")
    ]
    assert text.splitlines()[-1].split() == ["total", "10,485,760", "B", "10.00", "MiB"]
    assert len(text.splitlines()) == 6


def test_ledger_refuses_below_the_floor_and_names_it():
    ledger = Ledger(100)
    ledger.charge("a", 80)
    ledger.charge("b", 30)
    with pytest.raises(BudgetError, match="floor of 110 bytes") as caught:
        ledger.settle()
    assert (caught.value.budget_bytes, caught.value.floor_bytes) == (100, 110)
    exact = Ledger(110)
    exact.charge("a", 80)
    exact.charge("b", 30)
    exact.settle()
    assert exact["unused"] == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: x.charge("a", 1), "twice"),
        (lambda x: x.charge("b", -1), "-1 bytes"),
        (lambda x: x.grant("b", 100), "are left"),
    ],
)
def test_ledger_misuse(call, message):
    ledger = Ledger(50)
    ledger.charge("a", 10)
    with pytest.raises(AssertionError, match=message):
        call(ledger)
