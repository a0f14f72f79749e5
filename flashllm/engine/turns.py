"""Turns: who may touch the engine now, token by token.

A generation takes a turn for each of its steps and gives it up while its caller looks at the
token.  What must happen between tokens (a resize, closing) is `between`: it runs at once when no
step is under way, else the stepping thread runs it when that step ends.  Steps never wait for
anything but a turn of somebody else, so nobody starves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Job:
    """Something to do between tokens, and what became of it."""

    def __init__(self, action: Callable[[], None]):
        self.action, self.done = action, False
        self.error: BaseException | None = None


class Turns:
    """At most one thread at a time is inside `step` or runs a job."""

    def __init__(self):
        self._turn = threading.Condition()  # its lock is re-entrant: a signal may come any time
        self._holder: int | None = None
        self._jobs: list[_Job] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Hold the turn; what waited for the time between tokens is done first."""
        self._acquire()
        try:
            self._run_jobs()
            yield
        finally:
            self._end()

    def between(self, action: Callable[[], None]) -> None:
        """Run `action` while no step is under way and return when it has run; raises its error.

        Inside a step of this very thread (a signal handler, a progress callback) it cannot wait:
        it is then done when this step ends, and its error is dropped.
        """
        job = _Job(action)
        me = threading.get_ident()
        with self._turn:
            self._jobs.append(job)
            if self._holder == me:
                return
            self._turn.wait_for(lambda: self._holder is None or job.done)
            if not job.done:
                self._holder = me
        if self._holder == me:
            self._end()
        if job.error is not None:
            raise job.error

    def _acquire(self) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._holder is None)
            self._holder = threading.get_ident()

    def _end(self) -> None:
        try:
            self._run_jobs()
        finally:
            with self._turn:
                self._holder = None
                self._turn.notify_all()

    def _run_jobs(self) -> None:
        """The turn is held; errors go to whoever asked, except what would end this thread."""
        while self._jobs:
            job = self._jobs.pop(0)
            try:
                job.action()
            except Exception as error:
                job.error = error
            finally:
                job.done = True
