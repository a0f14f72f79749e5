"""One child process, cold, under a kernel memory limit, and what was seen of it from outside.

The files it will read are dropped from the page cache first and that is checked with mincore; the
limit is a memory cgroup (probe/cgroup.py); bytes read are the whole disk's own counter, so that
read-ahead and other ways into the file count alike for everybody.  Nothing else should run.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flashllm.probe.cgroup import Charges, MemoryGroup
from flashllm.stress.confine import make_cold


@dataclass(frozen=True)
class Finished:
    code: int  # negative: the signal that ended it
    out: str
    err: str
    charges: Charges
    device_bytes: int  # the whole disk read this much meanwhile
    seconds: float
    timed_out: bool


def run_confined(
    command: Sequence[str], *, group_bytes: int, files: Sequence[Path],
    timeout_s: float | None = None, env: dict[str, str] | None = None,
) -> Finished:
    """Run `command` to its end in a fresh group of `group_bytes`, with `files` out of the cache,
    unless they have no disk to come from (tmpfs)."""
    for file in files:
        if _counters(file).exists() and (left := make_cold(file)):
            raise RuntimeError(f"{file}: {left} bytes stayed in the page cache; it is not cold")
    before, started, timed_out = device_bytes_read(files[0]), time.monotonic(), False
    with MemoryGroup(group_bytes, name="flashllm-bench") as group:
        child = group.popen(
            list(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        try:
            out, err = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            child.kill()
            out, err = child.communicate()
        charges = group.charges()
    return Finished(
        code=child.returncode, out=out, err=err, charges=charges, timed_out=timed_out,
        device_bytes=device_bytes_read(files[0]) - before, seconds=time.monotonic() - started,
    )  # fmt: skip


def device_bytes_read(path: Path) -> int:
    """Bytes that the disk under `path` has read since boot (the kernel's sectors of 512); 0 where
    there is no such disk (tmpfs)."""
    counters = _counters(path)
    return 512 * int(counters.read_text().split()[2]) if counters.exists() else 0


def _counters(path: Path) -> Path:
    return _block_device(path) / "stat"


@contextmanager
def read_ahead(path: Path, kib: int) -> Iterator[None]:
    """The read-ahead of the disk under `path` set to `kib`, and put back; OSError if it cannot."""
    setting = read_ahead_file(path)
    before = setting.read_text().strip()
    setting.write_text(str(kib))
    try:
        yield
    finally:
        setting.write_text(before)


def read_ahead_file(path: Path) -> Path:
    """Where the kernel keeps the read-ahead (KiB) of the disk under `path`; may not exist."""
    device = _block_device(path)
    own = device / "queue" / "read_ahead_kb"
    return own if own.exists() else device.resolve().parent / "queue" / "read_ahead_kb"


def _block_device(path: Path) -> Path:
    device = os.stat(path).st_dev
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
