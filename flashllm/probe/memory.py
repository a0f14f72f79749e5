"""How much memory this process may use: control groups of both versions, and the machine.

A group's page cache counts as free (the kernel reclaims it first); every group on the way to the
root limits; "max" and the version 1 equivalent mean none.  All files are found below `proc`, so
that a test can bring its own tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..units import format_size

# Version 1 says "no limit" with the largest page count times the page size, near 2**63.
_UNLIMITED = 2**60
# Of MemAvailable, which is an estimate and is shared with everybody on the machine.
AVAILABLE_SHARE = 0.8


@dataclass(frozen=True)
class Group:
    """One memory control group directory and its numbers in bytes; limit None means none."""

    path: Path
    version: int
    limit: int | None
    usage: int
    reclaimable: int  # inactive_file + active_file, of the group and those below it

    @property
    def free(self) -> int | None:
        """limit - unreclaimable use."""
        if self.limit is None:
            return None
        return max(self.limit - max(self.usage - self.reclaimable, 0), 0)


@dataclass(frozen=True)
class Budget:
    """Bytes, and where the number comes from."""

    n_bytes: int
    source: str


def read_lines(path: Path) -> list[str]:
    """A proc or cgroup file's lines; none when it is not there or not ours to read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def read_number(path: Path) -> int | None:
    lines = read_lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _mounts(proc: Path) -> dict[int, tuple[Path, str]]:
    """Version -> (mount point, root inside the hierarchy) of the memory controllers."""
    found: dict[int, tuple[Path, str]] = {}
    for line in read_lines(proc / "self/mountinfo"):
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        point = Path(fields[4].encode().decode("unicode_escape"))
        if kind[0] == "cgroup2":
            found.setdefault(2, (point, fields[3]))
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            found.setdefault(1, (point, fields[3]))
    return found


def memory_groups(proc: Path = Path("/proc")) -> list[Group]:
    """The groups this process is charged to, from its own up to the mounted root.

    Empty where there is no memory controller.  A version 1 memory controller hides the version 2
    hierarchy, which then carries no memory files.
    """
    mounts, groups = _mounts(proc), []
    for line in read_lines(proc / "self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        version = 2 if controllers == "" else 1
        if version not in mounts or (version == 1 and "memory" not in controllers.split(",")):
            continue
        point, root = mounts[version]
        # Inside a container the mount shows a part of the hierarchy, the path the whole of it.
        if root != "/" and (inside == root or inside.startswith(root + "/")):
            inside = inside[len(root) :]
        below = [part for part in inside.split("/") if part]
        if ".." in below:  # a group outside this namespace: only its visible root is known
            below = []
        for depth in range(len(below), -1, -1):
            group = _read_group(point.joinpath(*below[:depth]), version)
            if group is not None:
                groups.append(group)
    return groups


def _read_group(path: Path, version: int) -> Group | None:
    if version == 1:
        usage, limits = read_number(path / "memory.usage_in_bytes"), ["memory.limit_in_bytes"]
        prefix = "total_"
    else:
        # memory.high throttles to a crawl instead of killing: no place to plan for, either.
        usage, limits = read_number(path / "memory.current"), ["memory.max", "memory.high"]
        prefix = ""
    if usage is None:
        return None
    known = [n for n in (read_number(path / name) for name in limits) if n is not None]
    limit = min((n for n in known if n < _UNLIMITED), default=None)
    wanted = {f"{prefix}inactive_file", f"{prefix}active_file"}
    stat = (line.split() for line in read_lines(path / "memory.stat"))
    reclaimable = sum(int(f[1]) for f in stat if len(f) == 2 and f[0] in wanted)
    return Group(path, version, limit, usage, min(reclaimable, usage))


def memory_available(proc: Path = Path("/proc")) -> int | None:
    """MemAvailable in bytes; None where the kernel does not say."""
    for line in read_lines(proc / "meminfo"):
        fields = line.split()
        if len(fields) >= 2 and fields[0] == "MemAvailable:":
            return int(fields[1]) * 1024
    return None


def automatic_budget(proc: Path = Path("/proc")) -> Budget:
    """min(limit - unreclaimable use, 0.8 x MemAvailable), with the source of the smaller named.

    Where the machine says nothing at all, 512 MiB, and the source says so.
    """
    offers = []
    for group in memory_groups(proc):
        if group.free is not None:
            source = (
                f"cgroup v{group.version} {group.path}: limit {format_size(group.limit)} less "
                f"{format_size(max(group.usage - group.reclaimable, 0))} in use"
            )
            offers.append(Budget(group.free, source))
    available = memory_available(proc)
    if available is not None:
        source = f"{AVAILABLE_SHARE:.0%} of MemAvailable {format_size(available)}"
        offers.append(Budget(int(available * AVAILABLE_SHARE), source))
    if not offers:
        return Budget(512 * 2**20, "a guess: neither a memory limit nor MemAvailable is known")
    return min(offers, key=lambda offer: offer.n_bytes)
