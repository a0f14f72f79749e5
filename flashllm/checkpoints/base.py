"""What a source checkpoint is to the rest of the house: named tensors, read a block at a time.

The contract:
- opening reads the directory of tensors only and believes none of it: names, shapes, types and
  ranges are checked against the file before anything is handed out (CheckpointError otherwise,
  within a second and 16 MiB for a hostile file); a well-formed kind or type that is not served is
  refused by its name (UnsupportedError);
- memory is the caller's block and nothing else: no tensor is kept, no file is mapped, and pages
  that were read are dropped from the page cache, so that a conversion inside a memory cgroup is
  not charged for its input;
- nothing is ever written to the source, and nothing in it is executed or imported;
- "NAME[a:b of n]" names a part of a fused tensor where a source has such: rows a to b-1 of tensor
  NAME seen as a matrix of its last axis, which must have n rows.  It has a shape and rows like any
  other name, and is not among `names()`;
- not thread-safe; close() is idempotent, and after it every read raises ClosedError.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import numpy as np

from ..errors import CheckpointError, ClosedError

T = TypeVar("T")

# Carried into the container as they are, where present (the tokenizer, and what chat needs later).
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "rwkv_vocab.txt",
)

# NumPy has no bfloat16: its bits travel as uint16.
STORAGE_DTYPES = {
    "f64": np.dtype("<f8"),
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
}


_PART = re.compile(r"(.+)\[(\d{1,12}):(\d{1,12}) of (\d{1,12})\]")


def part_of(name: str) -> tuple[str, int, int, int] | None:
    """(tensor, first row, row after the last, rows in all) of a part's name, None for a tensor's.

    The inverse of models.base.rows_of, which writes such names into roles.
    """
    found = _PART.fullmatch(name)
    if found is None:
        return None
    tensor, *numbers = found.groups()
    return tensor, *map(int, numbers)


def widen(stored: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values of an array as `Checkpoint.stored_rows` gives it."""
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


class Checkpoint(ABC):
    """See the module's contract.  `path` is what errors name; `config` is config.json's content.

    `normalised`: (family, config) where the source states our own config instead of such a file.
    """

    kind: ClassVar[str]

    def __init__(self, path: Path):
        self.path = path
        self.config: dict = {}
        self.generation_config: dict = {}
        self.normalised: tuple[str, dict] | None = None
        self.closed = False

    @property
    @abstractmethod
    def tokenizer_files(self) -> dict[str, bytes]:
        """Contents of the files of TOKENIZER_FILES that exist; read anew at each call."""

    @abstractmethod
    def names(self) -> list[str]:
        """Every tensor's name."""

    @abstractmethod
    def __contains__(self, name: object) -> bool: ...

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def dtype(self, name: str) -> str:
        """A key of STORAGE_DTYPES, or the source's own name of a type we only list."""

    @abstractmethod
    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) along the first axis, in the dtype of STORAGE_DTYPES."""

    def columns(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Columns [start, stop) of a matrix as [stop - start, n_rows], if that is cheap here.

        None where the source keeps rows together, which is what files do.
        """
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest that changes when the source does; its copies have the same one."""

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """The files with tensors, none of which may be overwritten."""

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """Bytes of all tensors as stored."""

    def itemsize(self, name: str) -> int:
        """Bytes of one stored value."""
        return STORAGE_DTYPES[self.dtype(name)].itemsize

    def close(self) -> None:
        self.closed = True

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The same rows as float32 (f64 is rounded to it)."""
        return widen(self.stored_rows(name, start, stop), self.dtype(name))

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """What opens or checks a checkpoint: after an error in it no file stays open."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"{self.path}: the checkpoint is closed")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


class TableCheckpoint(Checkpoint, Generic[T]):
    """A checkpoint of one file whose tensors are known by name from the start.

    A subclass fills `_tensors` (name -> whatever it needs to find one) and `_fingerprint`.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._tensors: dict[str, T] = {}
        self._fingerprint = ""

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def _at(self, name: str) -> T:
        self.check_open()
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(self.path, f"tensor {name!r}", "a tensor", "nothing") from None

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def files(self) -> list[Path]:
        return [self.path]
