"""A memory cgroup of a given size around a child process, v1 or v2, where we may create one.

Used by `flashllm demo`, the RAM-cap tests and the benches: the limit is the kernel's, and so are
the numbers read back.  Nothing here moves our own process; the child joins before it execs.
"""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..errors import UnsupportedError

V1_ROOT = Path("/sys/fs/cgroup/memory")
V2_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Charges:
    """What the kernel counted in a group: bytes, and events since it was made."""

    usage_bytes: int
    peak_bytes: int
    failcnt: int  # v1: times the limit was hit; v2: memory.events "max"
    oom_kills: int


class MemoryGroup:
    """A fresh memory cgroup with a hard limit; a context manager that removes it.

    Raises UnsupportedError, with the reason, where groups cannot be created (not root, no memory
    controller, not Linux).
    """

    def __init__(self, limit_bytes: int, name: str = "flashllm"):
        self.limit_bytes = limit_bytes
        self.path, self.version = _create(f"{name}-{os.getpid()}")
        try:
            if self.version == 1:
                self._write("memory.limit_in_bytes", limit_bytes)
            else:
                self._write("memory.max", limit_bytes)
                self._write("memory.swap.max", 0, optional=True)
        except OSError as error:
            self.close()
            raise UnsupportedError(f"cannot limit {self.path}: {error}") from None

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what is still inside and remove the group; safe to call twice."""
        if not self.path.exists():
            return
        for pid in self._read("cgroup.procs").split():
            try:
                os.kill(int(pid), signal.SIGKILL)
                os.waitpid(int(pid), 0)
            except (ProcessLookupError, ChildProcessError):
                continue
        self.path.rmdir()

    def popen(self, command: list[str], **kwargs) -> subprocess.Popen:
        """subprocess.Popen(command) whose process is inside the group before it execs."""
        procs = str(self.path / "cgroup.procs")

        def join() -> None:
            with open(procs, "w") as file:
                file.write(str(os.getpid()))

        return subprocess.Popen(command, preexec_fn=join, **kwargs)

    def set_limit(self, limit_bytes: int) -> None:
        self._write("memory.limit_in_bytes" if self.version == 1 else "memory.max", limit_bytes)
        self.limit_bytes = limit_bytes

    def charges(self) -> Charges:
        if self.version == 1:
            events = _pairs(self._read("memory.oom_control"))
            return Charges(
                usage_bytes=int(self._read("memory.usage_in_bytes")),
                peak_bytes=int(self._read("memory.max_usage_in_bytes")),
                failcnt=int(self._read("memory.failcnt")),
                oom_kills=events.get("oom_kill", 0),
            )
        events = _pairs(self._read("memory.events"))
        usage = int(self._read("memory.current"))
        peak = self.path / "memory.peak"  # kernel 5.19 and later
        return Charges(
            usage_bytes=usage,
            peak_bytes=int(peak.read_text()) if peak.exists() else usage,
            failcnt=events.get("max", 0),
            oom_kills=events.get("oom_kill", 0),
        )

    def _read(self, name: str) -> str:
        return (self.path / name).read_text()

    def _write(self, name: str, value: int, *, optional: bool = False) -> None:
        path = self.path / name
        if optional and not path.exists():
            return
        path.write_text(str(value))


def _pairs(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in text.splitlines())}


def _create(name: str) -> tuple[Path, int]:
    reasons = []
    for path, version, probe in (
        (V1_ROOT / name, 1, "memory.limit_in_bytes"),
        (V2_ROOT / name, 2, "memory.max"),
    ):
        try:
            path.mkdir()
        except OSError as error:
            reasons.append(f"cgroup v{version}: {error}")
            continue
        if (path / probe).exists():
            return path, version
        path.rmdir()
        reasons.append(f"cgroup v{version}: no memory controller in {path.parent}")
    raise UnsupportedError("cannot create a memory cgroup: " + "; ".join(reasons))
