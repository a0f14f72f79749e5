"""What the kernel charges this process for, now: its own pages, and its memory group.

drop_library_cache gives back what imports have left in the page cache.  A cold start of the
interpreter and NumPy charges its group about 91 MiB, 27 after this.  return_freed gives back what
the allocator keeps.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from .memory import Group, memory_groups, read_lines, read_number

_STATUS = {
    "VmRSS": "rss",
    "VmHWM": "peak_rss",
    "RssAnon": "rss_anon",
    "RssFile": "rss_file",
    "RssShmem": "rss_shmem",
}


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes, as /proc/self/status has them."""

    rss: int
    peak_rss: int
    rss_anon: int
    rss_file: int
    rss_shmem: int


@dataclass(frozen=True)
class GroupCharge:
    """Bytes charged to this process's own memory group, the most ever, and how often the limit was
    hit; None for what this kernel does not count."""

    usage: int
    max_usage: int | None
    limit_hits: int | None


def process_memory(proc: Path = Path("/proc")) -> ProcessMemory:
    """Resident memory of this process; zeros for lines that the kernel does not write.

    Where nothing can be read (no /proc here), the most that it ever was, which the kernel tells
    without: too much is a safe answer, zero would promise budgets that do not hold.
    """
    found = dict.fromkeys(_STATUS.values(), 0)
    for line in read_lines(proc / "self/status"):
        key, _, value = line.partition(":")
        if key in _STATUS:
            found[_STATUS[key]] = int(value.split()[0]) * 1024
    if not found["rss"]:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found |= {"rss": peak, "peak_rss": peak}
    return ProcessMemory(**found)


def own_group(proc: Path = Path("/proc")) -> Group | None:
    """The innermost memory group of this process."""
    return next(iter(memory_groups(proc)), None)


def group_charge(proc: Path = Path("/proc")) -> GroupCharge | None:
    """The counters of own_group(); None without a memory controller."""
    group = own_group(proc)
    if group is None:
        return None
    if group.version == 1:
        peak = read_number(group.path / "memory.max_usage_in_bytes")
        hits = read_number(group.path / "memory.failcnt")
    else:
        peak = read_number(group.path / "memory.peak")
        events = (line.split() for line in read_lines(group.path / "memory.events"))
        hits = next((int(f[1]) for f in events if len(f) == 2 and f[0] == "max"), None)
    return GroupCharge(group.usage, peak, hits)


def library_files() -> set[str]:
    """Files of code that this process maps or has imported.

    Not data: a mapped model belongs to another handle, and its device may not answer just now.
    """
    mapped = (line.split(maxsplit=5) for line in read_lines(Path("/proc/self/maps")))
    paths = {f[5] for f in mapped if len(f) == 6 and "x" in f[1] and f[5].startswith("/")}
    for module in list(sys.modules.values()):
        for path in (getattr(module, "__file__", None), getattr(module, "__cached__", None)):
            if isinstance(path, str):
                paths.add(path)
    return {path for path in paths if not path.startswith(("/dev/", "/proc/", "/sys/"))}


def drop_library_cache() -> int:
    """Ask the kernel to forget the page cache of our libraries' files; how many it was asked for.

    Pages in use stay; the rest comes back from disk when it is touched again.
    """
    n = 0
    for path in library_files():
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # deleted or replaced since it was mapped: nothing there to drop
            continue
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            n += 1
        finally:
            os.close(fd)
    return n


def _is_alone(group: Group) -> bool:
    members = {line.strip() for line in read_lines(group.path / "cgroup.procs")}
    return members == {str(os.getpid())}


def interpreter_bytes(proc: Path = Path("/proc")) -> int:
    """What the kernel charges for this process now: the larger of its resident memory and, in a
    limited group that it has to itself, the group's charge.

    A group shared with others says nothing about this process.
    """
    rss, group = process_memory(proc).rss, own_group(proc)
    if group is not None and group.limit is not None and _is_alone(group):
        return max(rss, group.usage)
    return rss


def return_freed() -> None:
    """Give freed memory back to the system where the C library can (glibc): an engine that was
    closed leaves 6 MiB in the allocator, and large arrays made and dropped leave more."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
