"""The measure of cheap refusals can fail."""

from __future__ import annotations

import mmap

import pytest

from . import cheap
from .cheap import MOST_BYTES


def raising(cost=None):
    def action():
        if cost is not None:
            cost()
        raise ValueError("no")

    return action


def by_the_library():
    """Pages that Python's own counters do not see."""
    with mmap.mmap(-1, 2 * MOST_BYTES, flags=mmap.MAP_PRIVATE) as pages:
        for at in range(0, len(pages), mmap.PAGESIZE):
            pages[at] = 1


def test_what_is_cheap_passes():
    assert str(cheap.refused(ValueError, raising(), "no")) == "no"


COSTS = {
    "bytes of Python's": (lambda: bytearray(2 * MOST_BYTES), "of Python's"),
    "pages": (by_the_library, "bytes of pages"),
    "time": (lambda: sum(range(2_000_000)), " s"),
}


@pytest.mark.parametrize("kind", COSTS)
def test_what_is_not_fails(monkeypatch, kind):
    cost, said = COSTS[kind]
    monkeypatch.setattr(cheap, "MOST_S", 0.001 if kind == "time" else 60.0)
    with pytest.raises(AssertionError, match=said):
        cheap.refused(ValueError, raising(cost))


def test_no_refusal_fails():
    with pytest.raises(pytest.fail.Exception):
        cheap.refused(ValueError, lambda: None)
