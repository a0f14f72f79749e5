"""rwkv.cpp's model files: records one after another to the end of the file, without any padding.

Header of six int32 (magic, version, vocabulary, width, layers, type); per record int32 dimensions,
key length and type, the shape fastest first, the key, the data.  Block types come out as float32.
Nothing says how many records there are, so the walk is bounded by their number and each one's size
is compared with what is left of the file before anything is believed.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import CheckpointError, UnsupportedError
from .base import TableCheckpoint
from .files import SourceFile
from .rwkv_blocks import BLOCK, BLOCK_TYPES
from .rwkv_names import MIXED_V6, STACKED, byte_vocabulary, canonical_shape, config_of
from .sampling import sample_digest

MAGIC = struct.pack("<I", 0x67676D66)
VERSIONS = (100, 101)
FLOAT_TYPES = {0: ("f32", np.dtype("<f4")), 1: ("f16", np.dtype("<f2"))}
_REMOVED = {4: "Q4_1_O", 5: "Q4_2", 6: "Q4_3"}
_HEADER, _RECORD = struct.Struct("<I5i"), struct.Struct("<3i")
_MAX_RECORDS, _MAX_DIMS, _MAX_KEY = 2**14, 4, 256
_LIMITS = {"n_vocab": 2**24, "n_embed": 2**21, "n_layer": 2**12}


@dataclass(frozen=True)
class _Place:
    """Where a tensor's data lies: `shape` as handed out, `type` as in the file."""

    offset: int
    shape: tuple[int, ...]
    type: int

    @property
    def n_cols(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1


class RWKVCppCheckpoint(TableCheckpoint[_Place]):
    """See Checkpoint.  Names and shapes are those of rwkv_names.py."""

    kind: ClassVar[str] = "rwkv.cpp"

    def __init__(self, path: Path):
        super().__init__(path)
        self._file = SourceFile(path)
        with self.closed_on_error():
            self._open()

    def _open(self) -> None:
        head = bytes(self._file.read(0, min(_HEADER.size, self._file.size)))
        if len(head) < _HEADER.size:
            raise CheckpointError(self.path, "header", f"{_HEADER.size} bytes", len(head))
        _, version, *numbers, data_type = _HEADER.unpack(head)
        if version not in VERSIONS:
            raise CheckpointError(self.path, "rwkv.cpp version", "100 or 101", version)
        for (name, limit), number in zip(_LIMITS.items(), numbers, strict=True):
            if not 1 <= number <= limit:
                raise CheckpointError(self.path, name, f"1 to {limit}", number)
        self._check_type("header", data_type)
        stored = self._walk()
        self.config = config_of(self.path, stored)
        found = (self.config["vocab_size"], self.config["hidden_size"],
                 self.config["num_hidden_layers"])  # fmt: skip
        for name, said, is_ in zip(_LIMITS, numbers, found, strict=True):
            if said != is_:
                raise CheckpointError(self.path, name, is_, said)
        self._fingerprint = hashlib.sha256(head + sample_digest(self._file)).hexdigest()

    def _check_type(self, where: str, code: int) -> None:
        if code in _REMOVED:
            raise UnsupportedError(f"{self.path}: {where}: type {_REMOVED[code]} is not supported")
        if code not in FLOAT_TYPES and code not in BLOCK_TYPES:
            known = sorted([*FLOAT_TYPES, *BLOCK_TYPES])
            raise CheckpointError(self.path, f"{where}: type", f"one of {known}", code)

    def _walk(self) -> dict[str, tuple[int, ...]]:
        """Fills `_tensors`; stored shapes by name."""
        stored: dict[str, tuple[int, ...]] = {}
        offset, size = _HEADER.size, self._file.size
        while offset < size:
            where = f"record {len(stored)} at {offset}"
            if len(stored) == _MAX_RECORDS:
                raise CheckpointError(self.path, where, "the end of the file", "another record")
            longest = _RECORD.size + 4 * _MAX_DIMS + _MAX_KEY
            head = bytes(self._file.read(offset, min(longest, size - offset)))
            name, shape, code, head_bytes = self._parse(head, where)
            if name in stored:
                raise CheckpointError(self.path, where, "each key once", repr(name))
            n_bytes = self._data_bytes(name, shape, code)
            offset += head_bytes
            if n_bytes > size - offset:
                raise CheckpointError(
                    self.path, f"tensor {name!r}", f"{n_bytes} bytes at {offset}", size - offset
                )
            stored[name] = shape
            self._place(name, shape, code, offset)
            offset += n_bytes
        return stored

    def _parse(self, head: bytes, where: str) -> tuple[str, tuple[int, ...], int, int]:
        """Key, shape (slowest first), type and length of a record's head."""
        if len(head) < _RECORD.size:
            raise CheckpointError(self.path, where, f"{_RECORD.size} bytes", len(head))
        n_dims, key_length, code = _RECORD.unpack_from(head)
        if not 1 <= n_dims <= _MAX_DIMS:
            raise CheckpointError(self.path, f"{where}: dimensions", f"1 to {_MAX_DIMS}", n_dims)
        if not 1 <= key_length <= _MAX_KEY:
            raise CheckpointError(self.path, f"{where}: key", f"1 to {_MAX_KEY} bytes", key_length)
        self._check_type(where, code)
        length = _RECORD.size + 4 * n_dims + key_length
        if len(head) < length:
            raise CheckpointError(self.path, where, f"{length} bytes", len(head))
        shape = struct.unpack_from(f"<{n_dims}i", head, _RECORD.size)[::-1]
        if not all(1 <= n <= 2**24 for n in shape):
            raise CheckpointError(self.path, f"{where}: shape", "sizes of 1 to 2^24", list(shape))
        key = head[length - key_length : length]
        if not all(33 <= byte < 127 for byte in key):
            raise CheckpointError(self.path, f"{where}: key", "printable ASCII", key[:40])
        return key.decode("ascii"), shape, code, length

    def _data_bytes(self, name: str, shape: tuple[int, ...], code: int) -> int:
        n_values = 1
        for n in shape:
            n_values *= n
        if code in FLOAT_TYPES:
            return n_values * FLOAT_TYPES[code][1].itemsize
        if shape[-1] % BLOCK:
            what = f"rows of whole blocks of {BLOCK}"
            raise CheckpointError(self.path, f"tensor {name!r}", what, list(shape))
        return n_values // BLOCK * BLOCK_TYPES[code].n_bytes

    def _place(self, name: str, shape: tuple[int, ...], code: int, offset: int) -> None:
        if name.endswith(STACKED) and len(shape) == 3 and shape[0] == len(MIXED_V6):
            n_bytes = self._data_bytes(name, shape[1:], code)
            for i, x in enumerate(MIXED_V6):
                self._tensors[f"{name}.{x}"] = _Place(offset + i * n_bytes, shape[1:], code)
            return
        self._tensors[name] = _Place(offset, canonical_shape(name, shape), code)

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """A vocabulary of 256 is the bytes themselves; others travel apart from these files."""
        return byte_vocabulary() if self.config["vocab_size"] == 256 else {}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._at(name).shape

    def dtype(self, name: str) -> str:
        code = self._at(name).type
        return FLOAT_TYPES[code][0] if code in FLOAT_TYPES else "f32"

    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        place = self._at(name)
        if place.type in FLOAT_TYPES:
            values = np.empty((stop - start, *place.shape[1:]), FLOAT_TYPES[place.type][1])
            row_bytes = place.n_cols * values.itemsize
            if values.nbytes:
                at = place.offset + start * row_bytes
                self._file.read_into(at, memoryview(values).cast("B"))
            return values
        kind = BLOCK_TYPES[place.type]
        if len(place.shape) == 1:  # a flattened matrix: whole, because a row is less than a block
            raw = self._file.read(place.offset, place.shape[0] // BLOCK * kind.n_bytes)
            blocks = np.frombuffer(raw, np.uint8).reshape(-1, kind.n_bytes)
            return kind.decode(blocks).ravel()[start:stop]
        row_bytes = place.n_cols // BLOCK * kind.n_bytes
        raw = self._file.read(place.offset + start * row_bytes, (stop - start) * row_bytes)
        blocks = np.frombuffer(raw, np.uint8).reshape(-1, kind.n_bytes)
        return kind.decode(blocks).reshape(stop - start, place.n_cols)

    @property
    def n_bytes(self) -> int:
        return self._file.size

    def close(self) -> None:
        super().close()
        self._file.close()
