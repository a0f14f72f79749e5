"""Files that appear whole or not at all."""

from __future__ import annotations

import os

import pytest

from flashllm.durable import WholeFile


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


def test_the_name_is_given_after_the_content_is_on_the_disk(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))
        )
    write(tmp_path / "x", b"content")
    assert calls == ["fsync", "replace", "fsync"]  # the last of the directory
