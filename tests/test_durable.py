"""Files that appear whole or not at all."""

from __future__ import annotations

import os

import pytest

from flashllm import convert
from flashllm.durable import WholeFile
from flashllm.errors import UsageError

from .tiny import GOLDEN


def write(path, data: bytes, *, fail: BaseException | None = None) -> None:
    with WholeFile(path) as out:
        out.file.write(data)
        if fail is not None:
            raise fail
        out.commit()


def test_a_file_appears_with_all_of_its_content(tmp_path):
    path = tmp_path / "x"
    write(path, b"first")
    write(path, b"second")
    assert path.read_bytes() == b"second" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("fail", [ValueError(), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path, before, fail):
    path = tmp_path / "x"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(type(fail)):
        write(path, b"half", fail=fail)
    assert os.listdir(tmp_path) == ([] if before is None else ["x"])
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_commit_that_fails_leaves_what_was_there(tmp_path, monkeypatch, call):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def failing(*_: object) -> None:
        raise OSError(5, "no more")

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError):
        write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


PLACES = {
    "a directory": os.mkdir,
    "a FIFO": os.mkfifo,
    "a link to a directory": lambda path: os.symlink(path.parent, path),
    "a link to a device": lambda path: os.symlink(os.devnull, path),
}


@pytest.mark.parametrize("name", ["x", "x.partial"])
@pytest.mark.parametrize("place", PLACES)
def test_only_files_are_replaced(tmp_path, place, name):
    """A rename puts a file in place of a device just as well, and the whole system loses it."""
    PLACES[place](tmp_path / name)
    before = os.lstat(tmp_path / name)
    with pytest.raises(UsageError, match="a directory|no regular file"):
        write(tmp_path / "x", b"content")
    assert os.lstat(tmp_path / name) == before and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("place", PLACES)
def test_nor_by_a_conversion(tmp_path, place):
    PLACES[place](tmp_path / "x")
    before = os.lstat(tmp_path / "x")
    with pytest.raises(UsageError, match="a directory|no regular file"):
        convert(GOLDEN / "llama-relu", tmp_path / "x", overwrite=True)
    assert os.lstat(tmp_path / "x") == before and os.listdir(tmp_path) == ["x"]


def test_the_name_is_given_after_the_content_is_on_the_disk(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))
        )
    write(tmp_path / "x", b"content")
    assert calls == ["fsync", "replace", "fsync"]  # the last of the directory
