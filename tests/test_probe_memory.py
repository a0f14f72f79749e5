"""Memory limits read from trees that a test writes: versions, nesting, absence, page cache."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from flashllm.probe import memory, process

MIB = 2**20
NO_LIMIT_V1 = 9223372036854771712


@dataclass
class Tree:
    """A /proc and the cgroup mounts that its mountinfo names."""

    root: Path

    def __post_init__(self):
        (self.root / "proc/self").mkdir(parents=True)
        self.mountinfo, self.cgroup = [], []
        self.write("proc/meminfo", "MemTotal: 9 kB\nMemAvailable: 10240000 kB\n")

    @property
    def proc(self):
        return self.root / "proc"

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def mount(self, version, where, *, inside="/"):
        kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
        where = str(self.root / where).replace(" ", "\\040")
        self.mountinfo.append(f"30 20 0:1 {inside} {where} rw shared:1 - {kind}")
        self.write("proc/self/mountinfo", "\n".join(["bad line", *self.mountinfo]) + "\n")

    def member(self, line):
        self.cgroup.append(line)
        self.write("proc/self/cgroup", "\n".join(self.cgroup) + "\n")

    def v1(self, where, limit, usage, cache=0):
        self.write(f"{where}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{where}/memory.usage_in_bytes", f"{usage}\n")
        self.write(
            f"{where}/memory.stat",
            f"inactive_file 1\ntotal_inactive_file {cache // 2}\ntotal_active_file {cache // 2}\n",
        )

    def v2(self, where, limit, usage, cache=0, high="max"):
        self.write(f"{where}/memory.max", f"{limit}\n")
        self.write(f"{where}/memory.high", f"{high}\n")
        self.write(f"{where}/memory.current", f"{usage}\n")
        self.write(
            f"{where}/memory.stat",
            f"anon 5\ninactive_file {cache // 2}\nactive_file {cache // 2}\n",
        )


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_version_2(tree):
    tree.mount(2, "cg")
    tree.member("0::/app")
    tree.v2("cg/app", 512 * MIB, 100 * MIB)
    budget = memory.automatic_budget(tree.proc)
    assert budget.n_bytes == 412 * MIB
    assert "cgroup v2" in budget.source and "512.0 MiB" in budget.source


def test_version_1(tree):
    tree.mount(1, "cg/memory")
    tree.member("9:name=systemd:/")
    tree.member("4:cpu,memory:/app")
    tree.member("0::/")
    tree.v1("cg/memory/app", 512 * MIB, 100 * MIB)
    tree.v1("cg/memory", NO_LIMIT_V1, 900 * MIB)
    budget = memory.automatic_budget(tree.proc)
    assert budget.n_bytes == 412 * MIB and "cgroup v1" in budget.source


@pytest.mark.parametrize("version", [1, 2])
def test_page_cache_counts_as_free(tree, version):
    tree.mount(version, "cg")
    tree.member("0::/app" if version == 2 else "4:memory:/app")
    write = tree.v2 if version == 2 else tree.v1
    write("cg/app", 512 * MIB, 511 * MIB, cache=400 * MIB)
    assert memory.automatic_budget(tree.proc).n_bytes == 401 * MIB


@pytest.mark.parametrize("tight", ["a", "a/b", "a/b/c"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_of_nested_groups_decides(tree, version, tight):
    tree.mount(version, "cg")
    tree.member("0::/a/b/c" if version == 2 else "4:memory:/a/b/c")
    for where in ("a", "a/b", "a/b/c"):
        limit = 200 * MIB if where == tight else 2000 * MIB
        (tree.v2 if version == 2 else tree.v1)(f"cg/{where}", limit, 50 * MIB)
    budget = memory.automatic_budget(tree.proc)
    assert budget.n_bytes == 150 * MIB and str(tree.root / "cg" / tight) + ":" in budget.source


def test_a_full_parent_is_tighter_than_a_smaller_child(tree):
    tree.mount(2, "cg")
    tree.member("0::/a/b")
    tree.v2("cg/a", 1000 * MIB, 960 * MIB)
    tree.v2("cg/a/b", 500 * MIB, 10 * MIB)
    assert memory.automatic_budget(tree.proc).n_bytes == 40 * MIB


def test_memory_high_is_a_limit_too(tree):
    tree.mount(2, "cg")
    tree.member("0::/a")
    tree.v2("cg/a", 1000 * MIB, 100 * MIB, high=400 * MIB)
    assert memory.automatic_budget(tree.proc).n_bytes == 300 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_no_limit_leaves_the_machine(tree, version):
    tree.mount(version, "cg")
    tree.member("0::/app" if version == 2 else "4:memory:/app")
    (tree.v2 if version == 2 else tree.v1)(
        "cg/app", "max" if version == 2 else NO_LIMIT_V1, 100 * MIB
    )
    budget = memory.automatic_budget(tree.proc)
    assert budget.n_bytes == int(0.8 * 10240000 * 1024) and "MemAvailable" in budget.source


def test_little_memory_available_beats_a_large_limit(tree):
    tree.write("proc/meminfo", "MemAvailable: 102400 kB\n")
    tree.mount(2, "cg")
    tree.member("0::/app")
    tree.v2("cg/app", 512 * MIB, 0)
    assert memory.automatic_budget(tree.proc).n_bytes == 80 * MIB


def test_a_container_that_sees_only_its_part(tree):
    """The mount shows /docker/x as its root, the membership names the whole way."""
    tree.mount(1, "cg", inside="/docker/x")
    tree.member("4:memory:/docker/x/job")
    tree.v1("cg/job", 300 * MIB, 100 * MIB)
    tree.v1("cg", 1000 * MIB, 200 * MIB)
    assert memory.automatic_budget(tree.proc).n_bytes == 200 * MIB


def test_a_group_outside_the_namespace_is_not_walked(tree):
    tree.mount(2, "cg")
    tree.member("0::/../../elsewhere")
    tree.v2("cg", 700 * MIB, 0)
    tree.v2("elsewhere", 1 * MIB, 0)
    assert memory.automatic_budget(tree.proc).n_bytes == 700 * MIB


def test_odd_names_of_mounts_and_groups(tree):
    tree.mount(2, "c g")
    tree.member("0::/a:b c")
    tree.v2("c g/a:b c", 300 * MIB, 0)
    assert memory.automatic_budget(tree.proc).n_bytes == 300 * MIB


def test_more_in_use_than_allowed_is_nothing_left(tree):
    tree.mount(2, "cg")
    tree.member("0::/a")
    tree.v2("cg/a", 100 * MIB, 150 * MIB)
    assert memory.automatic_budget(tree.proc).n_bytes == 0


def test_a_machine_that_says_nothing(tmp_path):
    budget = memory.automatic_budget(tmp_path)
    assert budget.n_bytes == 512 * MIB and "guess" in budget.source
    assert memory.memory_groups(tmp_path) == []
    assert process.group_charge(tmp_path) is None


def test_this_machine():
    budget = memory.automatic_budget()
    assert budget.n_bytes > 0 and budget.source


# ------------------------------------------------------------------------------- this process


def test_charges_of_both_versions(tree):
    tree.mount(1, "cg1")
    tree.member("4:memory:/a")
    tree.v1("cg1/a", 100 * MIB, 50 * MIB)
    tree.write("cg1/a/memory.max_usage_in_bytes", f"{70 * MIB}\n")
    tree.write("cg1/a/memory.failcnt", "3\n")
    assert process.group_charge(tree.proc) == process.GroupCharge(50 * MIB, 70 * MIB, 3)


def test_charges_of_version_2_with_and_without_a_peak(tree):
    tree.mount(2, "cg")
    tree.member("0::/a")
    tree.v2("cg/a", 100 * MIB, 50 * MIB)
    assert process.group_charge(tree.proc) == process.GroupCharge(50 * MIB, None, None)
    tree.write("cg/a/memory.peak", f"{60 * MIB}\n")
    tree.write("cg/a/memory.events", "low 0\nhigh 1\nmax 7\noom 0\n")
    assert process.group_charge(tree.proc) == process.GroupCharge(50 * MIB, 60 * MIB, 7)


@pytest.mark.parametrize(
    ("limit", "members", "expected"),
    [
        (100 * MIB, "alone", 50 * MIB),
        (100 * MIB, "shared", 33 * MIB),
        ("max", "alone", 33 * MIB),
    ],
)
def test_the_interpreters_share(tree, limit, members, expected):
    tree.write("proc/self/status", "VmHWM:\t40000 kB\nVmRSS:\t33792 kB\nRssAnon:\t1 kB\n")
    tree.mount(2, "cg")
    tree.member("0::/a")
    tree.v2("cg/a", limit, 50 * MIB)
    others = f"{os.getpid()}\n" + ("1\n" if members == "shared" else "")
    tree.write("cg/a/cgroup.procs", others)
    assert process.interpreter_bytes(tree.proc) == expected


def test_resident_memory_follows_an_allocation():
    before = process.process_memory()
    # A mapping of its own: the allocator may have as much lying about already.
    with mmap.mmap(-1, 24 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as fresh:
        fresh[:] = b"\1" * len(fresh)
        after = process.process_memory()
    assert after.rss_anon - before.rss_anon > 20 * MIB
    assert after.peak_rss >= after.rss > 0
    assert after.rss >= after.rss_anon + after.rss_file


def test_mapped_data_is_no_library(tmp_path):
    """Another handle's model: opening it could wait for a device that does not answer."""
    path = tmp_path / "model.flash"
    path.write_bytes(bytes(8192))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[0] == 0 and str(path) not in process.library_files()


def test_library_files_are_dropped_and_still_work():
    files = process.library_files()
    assert any(path.endswith("_core.abi3.so") or "_core." in path for path in files)
    assert process.__file__ in files
    assert 0 < process.drop_library_cache() <= len(files)
    import json

    assert json.loads("[1]") == [1]
