"""A child under a limit, and what was seen of it from outside.

The limit is a memory cgroup where one may be made; elsewhere the child limits its own private
memory (RLIMIT_DATA).  Either way resident memory is sampled from here, for `stress` about every
millisecond, so that a peak between two of the child's own looks is seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from ..probe.cgroup import Charges, MemoryGroup
from ..storage import resident_bytes
from ..units import MIB

SAMPLE_S = 1e-3
LOWER_S = 2.0  # a lower limit must be accepted within this time


@dataclass
class Seen:
    """A finished child: exit code, its announcements and report, and the outside's numbers."""

    code: int
    lines: list[dict[str, Any]]
    stderr: str
    peak_rss: int  # of the samples since the plan
    peak_anon: int
    peak_mapped: int
    late_rss: int  # largest sample since the limit was lowered
    n_samples: int
    charges: Charges | None
    lowered_s: float | None  # how long the kernel took to accept the lower limit
    seconds: float

    def event(self, name: str) -> dict[str, Any] | None:
        return next((line for line in self.lines if line.get("event") == name), None)

    @property
    def report(self) -> dict[str, Any]:
        return self.lines[-1] if self.code == 0 and self.lines else {}


class Sampler(threading.Thread):
    """Peaks of another process's resident memory, from /proc/PID/statm, until it is gone.

    `restart()` forgets the peaks so far.
    """

    def __init__(self, pid: int, sample_s: float = SAMPLE_S):
        super().__init__(daemon=True)
        self._sample_s = sample_s
        self._path, self._page = Path(f"/proc/{pid}/statm"), os.sysconf("SC_PAGESIZE")
        self._ended = threading.Event()
        self.n = 0
        self.restart()

    def restart(self) -> None:
        self.rss = self.anon = self.mapped = 0

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                _, resident, shared, *_ = self._path.read_text().split()
            except (OSError, ValueError):  # gone, or no /proc here
                return
            rss, mapped = int(resident) * self._page, int(shared) * self._page
            self.rss = max(self.rss, rss)
            self.anon = max(self.anon, rss - mapped)
            self.mapped = max(self.mapped, mapped)
            self.n += 1
            time.sleep(self._sample_s)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def can_confine() -> str | None:
    """None where memory cgroups can be made, else the reason."""
    try:
        with MemoryGroup(64 * MIB, name="flashllm-stress-probe"):
            return None
    except UnsupportedError as error:
        return str(error)


def run_child(
    spec: dict[str, Any], limit: int | None, *, name: str = "flashllm-stress",
    timeout: float = 600, module: str = "flashllm.stress.child", sample_s: float = SAMPLE_S,
    told: Callable[[dict[str, Any]], None] = lambda line: None,
) -> Seen:  # fmt: skip
    """Run `module` with `spec`, under `limit` bytes unless None, to its end.

    Its resident memory is sampled every `sample_s`; `told` hears each line of JSON as it comes.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        group = None
        if limit is not None:
            try:
                group = stack.enter_context(MemoryGroup(limit, name=name))
            except UnsupportedError:
                spec = {**spec, "limit_data": True}
        command = [sys.executable, "-m", module, json.dumps(spec)]
        popen = group.popen if group is not None else subprocess.Popen
        child = popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        killer = threading.Timer(timeout, child.kill)
        killer.start()
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(child.stderr.read()))
        reader.start()
        sampler = Sampler(child.pid, sample_s)
        sampler.start()
        lines, before, lowered_s = [], (0, 0, 0), None
        try:
            for text in child.stdout:
                line = json.loads(text)
                lines.append(line)
                told(line)
                if line.get("event") == "planned":
                    sampler.restart()
                elif line.get("event") == "resized":
                    before = (sampler.rss, sampler.anon, sampler.mapped)
                    sampler.restart()
                    lowered_s = _lower(group, line["ram_budget"]) if group is not None else None
            code = child.wait()
        finally:
            killer.cancel()
            child.kill()
            sampler.stop()
            reader.join()
            child.stdout.close()
            child.stderr.close()
        peaks = [max(a, b) for a, b in zip(
            before, (sampler.rss, sampler.anon, sampler.mapped), strict=True)]
        return Seen(
            code=code, lines=lines, stderr="".join(errors), peak_rss=peaks[0], peak_anon=peaks[1],
            peak_mapped=peaks[2], late_rss=sampler.rss, n_samples=sampler.n,
            charges=group.charges() if group is not None else None, lowered_s=lowered_s,
            seconds=time.monotonic() - started,
        )  # fmt: skip


def _lower(group: MemoryGroup, limit: int) -> float:
    """Lower the limit; seconds until the kernel accepted it, infinite when it never did."""
    started = time.monotonic()
    while time.monotonic() - started < LOWER_S:
        with suppress(OSError):  # version 1 refuses (EBUSY) what it cannot reclaim down to
            group.set_limit(limit)
            return time.monotonic() - started
        time.sleep(SAMPLE_S)
    return float("inf")


def make_cold(path: str | Path) -> int:
    """Drop the file's pages from the page cache; bytes that stayed (somebody else's mapping)."""

    def drop(fd: int) -> None:
        with suppress(OSError):  # dirty pages stay; a read-only file system need not know the call
            os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    return _with_file(path, drop)


def make_warm(path: str | Path) -> int:
    """Read the file through the page cache, charged to us and not to a child; bytes cached."""

    def read_all(fd: int) -> None:
        while os.read(fd, MIB):
            pass

    return _with_file(path, read_all)


def cached_bytes(path: str | Path) -> int:
    """Bytes of the file in the page cache."""
    return _with_file(path, lambda fd: None)


def _with_file(path: str | Path, action) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        action(fd)
        return resident_bytes(fd, 0, os.fstat(fd).st_size)
    finally:
        os.close(fd)
