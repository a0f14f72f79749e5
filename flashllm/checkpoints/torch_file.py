"""A PyTorch file (.pth), through torch's own weights-only loader and through nothing else.

Such a file is a zip archive around a pickle, and a pickle is a program.  We never run one: torch's
weights-only unpickler builds tensors and refuses everything else, and without a torch that has it
the file is refused by name.  torch maps the file, so here alone a source's pages may be charged to
this process until the kernel takes them back.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import CheckpointError, UnsupportedError
from .base import STORAGE_DTYPES, TableCheckpoint
from .files import SourceFile
from .sampling import sample_digest

# Before it, a crafted archive got past weights_only (CVE-2025-32434).
LEAST_TORCH = (2, 6)
_DTYPES = {"torch.float64": "f64", "torch.float32": "f32", "torch.float16": "f16",
           "torch.bfloat16": "bf16"}  # fmt: skip


class TorchCheckpoint(TableCheckpoint):
    """See Checkpoint.  A flat dictionary of dense tensors, as RWKV's authors publish them."""

    kind: ClassVar[str] = "PyTorch"

    def __init__(self, path: Path):
        super().__init__(path)
        self._torch = _torch(path)
        file = SourceFile(path)
        try:
            self._fingerprint = hashlib.sha256(b"PyTorch" + sample_digest(file)).hexdigest()
        finally:
            file.close()
        self._tensors = self._loaded()

    def _loaded(self) -> dict:
        try:
            found = self._torch.load(
                str(self.path), map_location="cpu", weights_only=True, mmap=True
            )
        except MemoryError:
            raise
        except Exception as problem:  # torch raises many kinds for files that are not its own
            said = " ".join(str(problem).split())[:200]
            raise CheckpointError(
                self.path, "content", "tensors that torch's weights-only loader accepts",
                f"{type(problem).__name__}: {said}",
            ) from None  # fmt: skip
        if not isinstance(found, dict) or not found:
            what = f"a {type(found).__name__} of {len(found) if hasattr(found, '__len__') else 1}"
            raise CheckpointError(self.path, "content", "a dictionary of tensors", what)
        for name, tensor in found.items():
            if not isinstance(name, str) or not isinstance(tensor, self._torch.Tensor):
                raise CheckpointError(
                    self.path, f"entry {name!r}", "a tensor", type(tensor).__name__
                )
            if str(tensor.layout) != "torch.strided" or tensor.is_quantized:
                raise CheckpointError(
                    self.path, f"tensor {name!r}", "a dense tensor", f"layout {tensor.layout}"
                )
        return found

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in self._at(name).shape)

    def dtype(self, name: str) -> str:
        dtype = str(self._at(name).dtype)
        return _DTYPES.get(dtype, dtype)

    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        dtype = self.dtype(name)
        if dtype not in STORAGE_DTYPES:
            raise UnsupportedError(f"{self.path}: tensor {name!r}: type {dtype} is not supported")
        rows = self._at(name).detach()[start:stop].contiguous()
        if dtype == "bf16":  # NumPy has no such type: its bits
            rows = rows.view(self._torch.int16)
        return np.array(rows.numpy().view(STORAGE_DTYPES[dtype]))

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors.values())

    def close(self) -> None:
        super().close()
        self._tensors = {}


def _torch(path: Path):
    """The torch module, or UnsupportedError that says what to do without it."""
    try:
        import torch
    except ImportError:
        raise UnsupportedError(
            f"{path}: a PyTorch file (zip archive with a pickle) is read by torch's weights-only "
            "loader and by nothing else, and torch is not installed; install torch, or convert the "
            "file to safetensors elsewhere"
        ) from None
    found = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    if found < LEAST_TORCH:
        least = ".".join(map(str, LEAST_TORCH))
        raise UnsupportedError(
            f"{path}: torch {torch.__version__} is installed; its weights-only loader can be "
            f"trusted from {least} on"
        )
    return torch
