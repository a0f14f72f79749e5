"""Memory pressure as the kernel tells it: stall times (PSI) and version 1 pressure events.

PSI is a counter of microseconds in which some task waited for memory, of the machine and, in the
version 2 hierarchy, of our own group: the share of time between two looks is the pressure.  The
version 1 memory controller sends an event when reclaim finds little left to reclaim, through an
eventfd registered with our group and with every one above it; an event counts as full pressure.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import UnsupportedError
from .memory import memory_groups, read_lines

# The kernel's three levels are low (anything is reclaimed at all, as caches are every minute),
# medium (much is scanned for little) and critical (nearly nothing is left).
V1_LEVEL = "medium"


@dataclass(frozen=True)
class Sample:
    """`share` of the last `seconds` in which somebody waited for memory, 0 to 1."""

    share: float
    seconds: float


class MemoryPressure:
    """`wait` for pressure, from one thread; `wake` and `close` from any.

    `sources` says in words what is watched.  Raises UnsupportedError where the kernel tells
    nothing.
    """

    def __init__(self, proc: Path = Path("/proc")):
        self._stalls = _stall_files(proc)
        self._events = _register_events(proc)
        self.sources = [str(path) for path in self._stalls] + [
            f"{path} ({V1_LEVEL})" for path, _, _ in self._events
        ]
        if not self.sources:
            raise UnsupportedError("this kernel tells neither stall times (PSI) nor memory events")
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._wake_read, select.POLLIN)
        for _, event, _ in self._events:
            self._poll.register(event, select.POLLIN)
        self._seen = [_stalled_us(path) for path in self._stalls]
        self._at = time.monotonic()

    def wait(self, seconds: float) -> Sample:
        """Return after `seconds`, or at once when an event comes or `wake` is called."""
        ready = {fd for fd, _ in self._poll.poll(seconds * 1e3)}
        pressed = False
        for _, event, _ in self._events:
            if event in ready:
                os.eventfd_read(event)
                pressed = True
        now = time.monotonic()
        passed, self._at = max(now - self._at, 1e-9), now
        counters = [_stalled_us(path) for path in self._stalls]
        shares = [
            (after - before) / 1e6 / passed
            for before, after in zip(self._seen, counters, strict=True)
        ]
        self._seen = counters
        return Sample(1.0 if pressed else min(max(shares, default=0.0), 1.0), passed)

    def wake(self) -> None:
        with suppress(OSError):
            os.write(self._wake_write, b"x")

    def close(self) -> None:
        """Release the descriptors; nobody waits any more."""
        for _, event, level in self._events:
            os.close(event)
            os.close(level)
        self._events = []
        os.close(self._wake_read)
        os.close(self._wake_write)


def _stall_files(proc: Path) -> list[Path]:
    """Files of stall times that can be read: the machine's, and our own version 2 group's."""
    found = [proc / "pressure/memory"]
    points = [line.split(" - ")[0].split(" ")[4] for line in read_lines(proc / "self/mountinfo")
              if " - cgroup2 " in line]  # fmt: skip
    inside = [line[3:] for line in read_lines(proc / "self/cgroup") if line.startswith("0::/")]
    if points and inside and ".." not in inside[0]:
        point = points[0].encode().decode("unicode_escape")
        found.append(Path(point) / inside[0].lstrip("/") / "memory.pressure")
    return [path for path in found if any(line.startswith("some ") for line in read_lines(path))]


def _stalled_us(path: Path) -> int:
    for line in read_lines(path):
        if line.startswith("some "):
            return int(line.rpartition("total=")[2])
    return 0


def _register_events(proc: Path) -> list[tuple[Path, int, int]]:
    """(group, eventfd, descriptor of the level) of every version 1 group that accepts us."""
    accepted = []
    for group in memory_groups(proc):
        if group.version != 1:
            continue
        try:
            level = os.open(group.path / "memory.pressure_level", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # not ours to watch
            continue
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            control = os.open(group.path / "cgroup.event_control", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(control, f"{event} {level} {V1_LEVEL}".encode())
            finally:
                os.close(control)
        except OSError:
            os.close(event)
            os.close(level)
            continue
        accepted.append((group.path, event, level))
    return accepted
