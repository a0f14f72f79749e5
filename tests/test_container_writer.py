"""The writer against kills, full disks and failing syncs: the final name is a whole file or none,
and an interrupted conversion goes on where it stopped (R-57, R-59)."""

from __future__ import annotations

import errno
import os
import random
import signal
import tracemalloc

import numpy as np
import pytest

from flashllm.container import ContainerWriter, lay_out_pieces, open_container, verify
from flashllm.container import partial as partial_module
from flashllm.errors import BusyError, ConversionError, FormatError, UsageError

from .container_makers import PLANES, make_container, make_items, write_plane


@pytest.fixture
def reference(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("reference") / "model.flash"
    make_container(path)
    return path.read_bytes()


def interrupt(path, n_planes: int, *, n_items: int = 0, **more) -> None:
    """Write `n_planes` whole planes and `n_items` of the next, then stop as a kill would."""
    given = dict(family="llama", config={"tie": True}, alignment=512, source="s") | more
    with ContainerWriter(path, **given) as writer:
        for i, plane in enumerate(PLANES[: n_planes + 1]):
            items = make_items(plane[2], plane[3], seed=i)
            if i < n_planes:
                write_plane(writer, plane, items)
            elif n_items:
                writer.begin_plane(plane[0], plane[1], lay_out_pieces(plane[2]), *plane[3:6])
                writer.write_items(items[:n_items])


def go_on(path, **more) -> list[str]:
    """Run the conversion to its end; returns the planes that had to be written."""
    given = dict(family="llama", config={"tie": True}, alignment=512, source="s") | more
    written = []
    with ContainerWriter(path, **given) as writer:
        for i, plane in enumerate(PLANES):
            if write_plane(writer, plane, make_items(plane[2], plane[3], seed=i)):
                written.append(plane[0])
        writer.commit()
    return written


@pytest.fixture
def uninterrupted(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "x.flash"
    go_on(path)
    return path.read_bytes()


NAMES = [plane[0] for plane in PLANES]


@pytest.mark.parametrize("n_planes, n_items", [(0, 0), (0, 5), (1, 0), (1, 7), (3, 2), (4, 0)])
def test_goes_on_after_the_last_whole_plane(tmp_path, uninterrupted, n_planes, n_items):
    path = tmp_path / "x.flash"
    interrupt(path, n_planes, n_items=n_items)
    assert not path.exists()
    assert go_on(path) == NAMES[n_planes:]
    assert path.read_bytes() == uninterrupted
    assert os.listdir(tmp_path) == ["x.flash"]


@pytest.mark.parametrize(
    "change",
    [
        dict(source="t"),
        dict(options={"quant": "int8"}),
        dict(alignment=4096),
        dict(config={"tie": False}),
        dict(family="opt"),
    ],
)
def test_another_conversion_starts_anew(tmp_path, change):
    path = tmp_path / "x.flash"
    interrupt(path, 3)
    assert go_on(path, **change) == NAMES
    assert verify(path).ok


def test_a_plane_of_another_shape_is_written_anew(tmp_path, uninterrupted):
    path = tmp_path / "x.flash"
    interrupt(path, 1)
    with ContainerWriter(
        path, family="llama", config={"tie": True}, alignment=512, source="s"
    ) as writer:
        row = lay_out_pieces([("row", "f32", 4)])
        write_plane(writer, PLANES[0], make_items(PLANES[0][2], PLANES[0][3]))
        assert writer.begin_plane("extra", "rows", row, n_items=1, per_frame=1)
        writer.write_items(np.zeros((1, 16), np.uint8))
        writer.end_plane()
    assert go_on(path) == NAMES[1:]
    assert path.read_bytes() == uninterrupted


@pytest.mark.parametrize("plane", [0, 1, 2])
def test_planes_that_the_disk_lost_are_written_anew(tmp_path, uninterrupted, plane):
    """After a power cut the journal may know more than the disk."""
    path = tmp_path / "x.flash"
    interrupt(path, 3)
    partial = tmp_path / "x.flash.partial"
    raw = bytearray(partial.read_bytes())
    raw[16384 * (plane + 1)] ^= 1
    partial.write_bytes(raw)
    assert go_on(path) == NAMES[plane:]
    assert path.read_bytes() == uninterrupted


@pytest.mark.parametrize("n_bytes", [0, 1, 16384, 40000])
def test_a_partial_file_that_was_cut(tmp_path, uninterrupted, n_bytes):
    path = tmp_path / "x.flash"
    interrupt(path, 3)
    os.truncate(tmp_path / "x.flash.partial", n_bytes)
    go_on(path)
    assert path.read_bytes() == uninterrupted


def test_any_damage_to_the_journal_costs_only_time(tmp_path, uninterrupted):
    path = tmp_path / "x.flash"
    interrupt(path, 3)
    journal, partial = tmp_path / "x.flash.partial.journal", tmp_path / "x.flash.partial"
    lines, raw = journal.read_bytes(), partial.read_bytes()
    rng = random.Random(0)
    for case in range(30):
        damaged = bytearray(lines)
        if case % 2:
            damaged[rng.randrange(len(lines))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(lines)) :]
        journal.write_bytes(damaged)
        partial.write_bytes(raw)
        go_on(path)
        assert path.read_bytes() == uninterrupted
        path.unlink()


def test_two_writers_of_one_file(tmp_path):
    given = dict(family="opt", config={})
    with (
        ContainerWriter(tmp_path / "x.flash", **given),
        pytest.raises(BusyError, match="another process"),
    ):
        ContainerWriter(tmp_path / "x.flash", **given)


def test_a_link_in_place_of_the_partial_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "x.flash.partial").symlink_to(victim)
    with pytest.raises(ConversionError):
        ContainerWriter(tmp_path / "x.flash", family="opt", config={})
    assert victim.read_text() == "precious"


def test_special_files_in_place_of_the_temporary_ones(tmp_path):
    for name in ("x.flash.partial", "y.flash.partial.journal"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ConversionError):
        ContainerWriter(tmp_path / "x.flash", family="opt", config={})
    with pytest.raises(FormatError, match="FIFO"):
        ContainerWriter(tmp_path / "y.flash", family="opt", config={})


def test_targets(tmp_path):
    with pytest.raises(ConversionError, match="No such file"):
        ContainerWriter(tmp_path / "nowhere" / "x.flash", family="opt", config={})
    with pytest.raises(UsageError, match="directory"):
        ContainerWriter(tmp_path, family="opt", config={})


# ------------------------------------------------------------------------------------- failures


def test_space_is_checked_first(tmp_path):
    with pytest.raises(ConversionError, match="are needed on this disk"):
        ContainerWriter(tmp_path / "x.flash", family="opt", config={}, estimate_bytes=2**60)
    assert not (tmp_path / "x.flash").exists()


@pytest.mark.parametrize("nth", range(12))
def test_full_disk_at_every_write(tmp_path, monkeypatch, uninterrupted, nth):
    """The n-th write fails; the next run goes on and its file is the same."""
    path, count = tmp_path / "x.flash", iter(range(1000))
    write = os.pwrite

    def full(fd, data, offset):
        if next(count) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[: max(1, len(data) // 2)], offset)  # and short ones otherwise

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(partial_module, "BATCH_BYTES", 4096)
    try:
        go_on(path)
    except ConversionError as error:
        assert "disk is full" in str(error) and not path.exists()
        monkeypatch.undo()
        go_on(path)
    assert path.read_bytes() == uninterrupted


@pytest.mark.parametrize("call", ["fsync", "fdatasync"])
def test_failed_sync_leaves_nothing(tmp_path, monkeypatch, call):
    def failing(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, failing)
    monkeypatch.setattr(partial_module, "SYNC_BYTES", 1 if call == "fdatasync" else 2**40)
    with pytest.raises(ConversionError, match="sync failed: Input/output error"):
        go_on(tmp_path / "x.flash")
    assert not os.listdir(tmp_path)


def test_failed_sync_of_the_directory_leaves_nothing(tmp_path, monkeypatch):
    def failing(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(partial_module, "sync_directory", failing)
    with pytest.raises(ConversionError, match="directory"):
        go_on(tmp_path / "x.flash")
    assert not os.listdir(tmp_path)


def test_the_order_of_durability(tmp_path, monkeypatch):
    """fsync of the whole file, rename, fsync of the directory; nothing is written in between."""
    calls = []
    for name in ("pwrite", "fsync", "replace"):
        true = getattr(os, name)

        def noted(*args, name=name, true=true):
            calls.append(name)
            return true(*args)

        monkeypatch.setattr(os, name, noted)
    go_on(tmp_path / "x.flash")
    assert calls[-4:] == ["pwrite", "fsync", "replace", "fsync"]


def test_a_commit_that_stops_before_the_rename(tmp_path, monkeypatch, uninterrupted):
    """The partial file is whole by then; the next run must not grow something that opens."""

    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")

    path, partial = tmp_path / "x.flash", tmp_path / "x.flash.partial"
    interrupt(path, 4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: patch.setattr(os, "replace", failing))
        with pytest.raises(ConversionError, match="is kept"):
            go_on(path)
    open_container(partial).close()
    interrupt(path, 4)
    with pytest.raises(FormatError, match="magic"):
        open_container(partial)
    assert go_on(path) == []
    assert path.read_bytes() == uninterrupted


# ------------------------------------------------------------------------------------------ kills


def killed_at(path, nth: int) -> bool:
    """Write the container in a child that kills itself at its n-th call that touches the disk,
    half-way through if it is a write; False if it got to its end before."""
    child = os.fork()
    if child == 0:
        try:
            _count_down(nth)
            make_container(path)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


def _count_down(nth: int) -> None:
    partial_module.BATCH_BYTES = 2048
    left = nth

    def guard(name: str) -> None:
        true = getattr(os, name)

        def call(*args, **more):
            nonlocal left
            left -= 1
            if left == 0:
                if name in ("pwrite", "write"):
                    true(args[0], args[1][: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return true(*args, **more)

        setattr(os, name, call)

    for name in ("pwrite", "write", "fsync", "replace", "ftruncate", "fchmod", "unlink"):
        guard(name)


@pytest.mark.parametrize("fresh", [True, False])
def test_killed_at_every_call(tmp_path, reference, fresh):
    """Either each kill meets an empty directory, or what the kills before have left behind."""
    path = tmp_path / "model.flash"
    nth = 1
    while killed_at(path, nth):
        if path.exists():
            assert path.read_bytes() == reference
            path.unlink()
        elif fresh:
            assert not killed_at(path, 10**9)
            assert path.read_bytes() == reference
            assert os.listdir(tmp_path) == ["model.flash"]
            path.unlink()
        nth += 1
    assert nth >= 15
    assert path.read_bytes() == reference
    assert os.listdir(tmp_path) == ["model.flash"]


# -------------------------------------------------------------------------------------- resources


def test_memory_is_bounded(tmp_path):
    """256 MiB of items in blocks of 1 MiB: a batch, a frame, a table, nothing that grows."""
    pieces = lay_out_pieces([("row", "int8", 4096)])
    block = np.zeros((256, 4352), np.uint8)
    with ContainerWriter(tmp_path / "x.flash", family="opt", config={}) as writer:
        writer.begin_plane("embed", "rows", pieces, n_items=256 * 60, per_frame=60)
        tracemalloc.start()
        for _ in range(60):
            writer.write_items(block)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        writer.end_plane()
    assert peak < 4 * 2**20


def test_descriptors_are_returned(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for case in range(5):
        interrupt(tmp_path / "x.flash", 2, n_items=1)
        go_on(tmp_path / f"{case}.flash")
        open_container(tmp_path / f"{case}.flash").close()
        verify(tmp_path / f"{case}.flash")
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before
