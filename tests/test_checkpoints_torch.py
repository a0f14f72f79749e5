"""PyTorch files: read by torch's weights-only loader or not at all; no pickle is ever executed.

A stand-in for torch shows what it is asked; tests with the real one run where it is installed.
"""

from __future__ import annotations

import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from flashllm.checkpoints import open_checkpoint
from flashllm.errors import CheckpointError, ClosedError, UnsupportedError

from .rwkv_models import exported, official, written


class Hostile:
    """Unpickling it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def hostile(tmp_path):
    """(a .pth whose pickle is a program, the directory it would make)."""
    path, made = tmp_path / "m.pth", tmp_path / "made"
    payload = pickle.dumps({"emb.weight": Hostile(made)}, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    (tmp_path / "m.pkl").write_bytes(payload)
    pickle.loads(payload)  # noqa: S301 (it is a program indeed)
    made.rmdir()
    return path, made


class FakeTensor:
    """What the reader asks of a tensor, over a NumPy array; `dtype` as torch words it."""

    layout, is_quantized = "torch.strided", False

    def __init__(self, array, dtype="torch.float32"):
        self.array, self.dtype, self.shape = array, dtype, array.shape

    def __getitem__(self, rows):
        return FakeTensor(self.array[rows], self.dtype)

    def detach(self):
        return self

    def contiguous(self):
        return FakeTensor(np.ascontiguousarray(self.array), self.dtype)

    def view(self, dtype):
        assert (self.dtype, dtype) == ("torch.bfloat16", "int16")
        return self

    def numpy(self):
        return self.array

    def numel(self):
        return self.array.size

    def element_size(self):
        return self.array.itemsize


@pytest.fixture
def fake_torch(monkeypatch):
    """A torch whose `load` gives `.answer`, or raises it; `.asked` is what it was asked."""
    torch = types.ModuleType("torch")
    torch.__version__, torch.Tensor, torch.int16 = "2.9.1+cpu", FakeTensor, "int16"
    torch.asked = []

    def load(path, **options):
        torch.asked.append(options)
        if isinstance(torch.answer, Exception):
            raise torch.answer
        return torch.answer

    torch.load = load
    monkeypatch.setitem(sys.modules, "torch", torch)
    return torch


def test_without_torch_a_hostile_pickle_is_refused_by_name(hostile, monkeypatch):
    path, made = hostile
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with pytest.raises(UnsupportedError, match="weights-only.*torch is not installed"):
        open_checkpoint(path)
    with pytest.raises(UnsupportedError, match="pickles are never read"):
        open_checkpoint(path.with_suffix(".pkl"))
    with pytest.raises(UnsupportedError, match=r"m\.p(th|kl).*(directory|never)"):
        open_checkpoint(path.parent)
    assert not made.exists()


def test_with_torch_it_is_refused_by_its_loader(hostile):
    pytest.importorskip("torch")
    path, made = hostile
    with pytest.raises(CheckpointError, match="weights-only loader accepts"):
        open_checkpoint(path)
    assert not made.exists()


def test_only_the_weights_only_loader_is_asked(hostile, fake_torch):
    path, made = hostile
    fake_torch.answer = pickle.UnpicklingError("Weights only load failed.\n posix.mkdir")
    with pytest.raises(CheckpointError, match="UnpicklingError: Weights only load failed. posix"):
        open_checkpoint(path)
    assert [options["weights_only"] for options in fake_torch.asked] == [True]
    assert not made.exists()


def test_a_torch_with_the_hole_in_its_loader_is_refused(hostile, fake_torch):
    fake_torch.__version__ = "2.5.1"
    with pytest.raises(UnsupportedError, match=r"2\.5\.1.*from 2\.6"):
        open_checkpoint(hostile[0])
    assert fake_torch.asked == []


def bf16(a):
    return (np.ascontiguousarray(a, "<f4").view(np.uint32) >> 16).astype(np.int16)


@pytest.mark.parametrize("version", ["5.2", "7"])
def test_the_model_of_its_rwkv_cpp_file(hostile, fake_torch, tmp_path, version):
    tensors = official(version)
    fake_torch.answer = {name: FakeTensor(a) for name, a in tensors.items()}
    expected = written(tmp_path / "m.bin", exported(tensors, version))
    with open_checkpoint(expected) as a, open_checkpoint(hostile[0]) as b:
        assert set(a.names()) == set(b.names()) and a.config == b.config
        assert b.n_bytes == 4 * sum(t.size for t in tensors.values()) and b.files == [hostile[0]]
        for name in a.names():
            n = a.shape(name)[0]
            np.testing.assert_allclose(b.rows(name, 0, n), a.rows(name, 0, n), rtol=1e-6)
    with pytest.raises(ClosedError):
        b.rows("head.weight", 0, 1)
    cut = {name: FakeTensor(bf16(a), "torch.bfloat16") for name, a in tensors.items()}
    fake_torch.answer = cut
    with open_checkpoint(hostile[0]) as b:
        found = b.rows("head.weight", 3, 5)
        stored = tensors["head.weight"][3:5].view(np.uint32) & np.uint32(0xFFFF0000)
        np.testing.assert_array_equal(found, stored.view(np.float32))


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        ([1, 2], CheckpointError, "dictionary of tensors.*a list of 2"),
        ({}, CheckpointError, "a dict of 0"),
        ({"emb.weight": 3}, CheckpointError, "emb.weight.*a tensor, found int"),
        ({5: FakeTensor(np.zeros(2))}, CheckpointError, "entry 5"),
        ({"layers.0.w": FakeTensor(np.zeros(2))}, UnsupportedError, "only RWKV"),
    ],
)
def test_what_is_not_a_flat_dictionary_of_rwkv_tensors(hostile, fake_torch, answer, error, match):
    fake_torch.answer = answer
    with pytest.raises(error, match=match):
        open_checkpoint(hostile[0])


def test_types_and_layouts_that_are_not_served(hostile, fake_torch):
    tensors = {name: FakeTensor(a) for name, a in official("4").items()}
    tensors["head.weight"].layout = "torch.sparse_coo"
    fake_torch.answer = tensors
    with pytest.raises(CheckpointError, match="head.weight.*dense tensor.*sparse"):
        open_checkpoint(hostile[0])
    tensors["head.weight"].layout, tensors["head.weight"].dtype = "torch.strided", "torch.int8"
    with (
        open_checkpoint(hostile[0]) as found,
        pytest.raises(UnsupportedError, match="head.weight.*torch.int8"),
    ):
        found.rows("head.weight", 0, 1)


@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_a_file_that_torch_wrote(tmp_path, version):
    torch = pytest.importorskip("torch")
    tensors = official(version)
    torch.save({n: torch.from_numpy(a.copy()) for n, a in tensors.items()}, tmp_path / "m.pth")
    expected = written(tmp_path / "m.bin", exported(tensors, version))
    with open_checkpoint(expected) as a, open_checkpoint(tmp_path / "m.pth") as b:
        assert set(a.names()) == set(b.names()) and a.config == b.config
        for name in a.names():
            n = a.shape(name)[0]
            np.testing.assert_allclose(b.rows(name, 0, n), a.rows(name, 0, n), rtol=1e-6)
    halves = {n: torch.from_numpy(a.copy()).bfloat16() for n, a in tensors.items()}
    torch.save(halves, tmp_path / "h.pth")
    with open_checkpoint(tmp_path / "h.pth") as b:
        expected = halves["head.weight"].float().numpy()
        np.testing.assert_array_equal(b.rows("head.weight", 0, 256), expected)
    whole = (tmp_path / "m.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "cut.pth")
