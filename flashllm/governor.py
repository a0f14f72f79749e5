"""The governor: gives memory back when the machine runs short of it, and takes it again slowly.

Off unless asked for.  It watches memory pressure in a thread of its own and resizes the engine
between the floor and the budget that the user gave; no token depends on it.  Down at once, by half
of what can be given up, again and again while pressure lasts; up by an eighth after a time without
any, and only into memory that is free.  Pressure after growing doubles that time: a cache larger
than the machine can hold is slower than a small one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .errors import ClosedError, FlashError
from .probe.pressure import MemoryPressure, Sample

LOOK_S = 0.25  # between two looks; an event ends the wait at once
PRESSED = 0.1  # share of time in which somebody waited for memory
PATIENCE_S, MOST_PATIENCE_S = 10.0, 160.0  # without pressure, before growing
GROWTH = 8  # steps from the floor to the whole


class Source(Protocol):
    """Where pressure is heard of; MemoryPressure says what each means."""

    def wait(self, seconds: float) -> Sample: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Course:
    """The decisions, without threads: the budget to have after each sample.

    `floor` and `most` bound it; `quiet_s` counts seconds without pressure since the last change,
    `settle_s` what is left of the time that a shrink gets to show its effect: events come faster.
    """

    floor: int
    most: int
    budget: int
    patience_s: float = PATIENCE_S
    quiet_s: float = 0.0
    settle_s: float = 0.0

    def after(self, sample: Sample, free_bytes: Callable[[], int]) -> int:
        """The budget from now on; `free_bytes()` is asked before growing."""
        self.settle_s -= sample.seconds
        if sample.share >= PRESSED:
            if self.settle_s <= 0.0:
                self._shrink()
        else:
            self.quiet_s += sample.seconds
            if self.quiet_s >= self.patience_s and self.budget < self.most:
                self._grow(free_bytes())
        return self.budget

    def _shrink(self) -> None:
        self.quiet_s, self.settle_s = 0.0, LOOK_S
        if self.budget > self.floor:
            self.patience_s = min(2 * self.patience_s, MOST_PATIENCE_S)
            self.budget = self.floor + (self.budget - self.floor) // 2

    def _grow(self, free: int) -> None:
        self.quiet_s = 0.0
        self.patience_s = max(self.patience_s / 2, PATIENCE_S)
        step = max(1, (self.most - self.floor) // GROWTH)
        self.budget = min(self.most, self.budget + min(step, free // 2))


class Governor:
    """Follows `source` with `resize()(budget)` until closed.

    `resize` is a weak reference: a handle that nobody holds any more is not kept alive by us.  A
    growth that could not be read leaves the smaller budget and `last_error`; the thread goes on.
    """

    def __init__(
        self, resize: Callable[[], Callable[[int], None] | None], *, floor: int, most: int,
        free_bytes: Callable[[], int], source: Source | None = None,
    ):  # fmt: skip
        self._resize, self._free_bytes = resize, free_bytes
        self._source = MemoryPressure() if source is None else source
        self._course = Course(floor, most, most)
        self._closed = False
        self.n_shrinks = self.n_growths = 0
        self.last_error: FlashError | None = None
        self.thread = threading.Thread(target=self._follow, name="flashllm-governor", daemon=True)
        self.thread.start()

    @property
    def most(self) -> int:
        """What the user gave; no budget that is set from here may exceed it."""
        return self._course.most

    def set_most(self, budget: int) -> None:
        """The user resized: this is the budget now, and the most from now on."""
        self._course = Course(self._course.floor, budget, budget)

    def close(self) -> None:
        """Stop following.  Does not wait: the thread may be waiting for the caller's own step."""
        self._closed = True
        self._source.wake()

    def figures(self) -> dict[str, int | str | None]:
        return {"shrinks": self.n_shrinks, "growths": self.n_growths,
                "error": str(self.last_error) if self.last_error else None}  # fmt: skip

    def _follow(self) -> None:
        try:
            while not self._closed:
                sample = self._source.wait(LOOK_S)
                if not self._closed:
                    self._turn(sample)
        except ClosedError:  # the engine was closed meanwhile
            pass
        finally:
            self._source.close()

    def _turn(self, sample: Sample) -> None:
        course = self._course
        before = course.budget
        budget = course.after(sample, self._free_bytes)
        if budget == before:
            return
        resize = self._resize()
        if resize is None:
            raise ClosedError("this LLM is gone")
        try:
            resize(budget)
        except ClosedError:
            raise
        except FlashError as error:
            course.budget, self.last_error = before, error
            return
        if budget < before:
            self.n_shrinks += 1
        else:
            self.n_growths += 1
