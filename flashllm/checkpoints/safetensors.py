"""Safetensors: one file, or shards with model.safetensors.index.json.

A file is a little-endian u64 header length, a JSON header {name: {dtype, shape, data_offsets}} and
the tensors' bytes side by side.  Read here by our own bounded reader rather than through the
package of that name, which maps the whole file: rows are read at offsets, so that neither address
space nor the page cache grows.  Promises checked before any tensor is handed out: the ranges lie in
the file, follow each other without holes or overlaps up to the file's last byte, and have exactly
the size that shape and type say.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import CheckpointError, UnsupportedError
from .base import STORAGE_DTYPES, TOKENIZER_FILES, Checkpoint, part_of
from .files import MAX_TOKENIZER_BYTES, SourceFile, read_json, read_whole
from .sampling import sample_digest
from .scan import Scanner

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 2**23  # 60,000 tensors; what is parsed is bounded by what is well-formed
MAX_INDEX_BYTES = 2**24
MAX_TENSORS = 2**17
MAX_SHARDS = 2**12
MAX_DIMENSIONS = 8

# bytes per value; those that STORAGE_DTYPES lacks are listed but never read
_DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor's place: `begin` is a file offset."""

    file: SourceFile
    dtype: str
    shape: tuple[int, ...]
    begin: int
    n_bytes: int


def read_header(file: SourceFile) -> tuple[dict[str, Entry], bytes]:
    """The checked directory of one file, and the header's bytes (for the fingerprint)."""
    path = file.path
    if file.size < 8:
        raise CheckpointError(path, "file size", "at least 8 bytes", file.size)
    (n_header,) = struct.unpack("<Q", file.read(0, 8))
    limit = min(MAX_HEADER_BYTES, file.size - 8)
    if not 2 <= n_header <= limit:
        raise CheckpointError(path, "header length", f"2 to {limit}", n_header)
    raw = bytes(file.read(8, n_header))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise CheckpointError(path, "header", "UTF-8", f"byte {problem.start}") from None
    base = 8 + n_header
    entries: dict[str, Entry] = {}
    scanner = Scanner(text, path)
    for name in scanner.keys():  # noqa: SIM118 (an iterator, not a dict)
        if name == "__metadata__":
            for _ in scanner.keys():  # noqa: SIM118
                scanner.skip_scalar()
        elif len(entries) == MAX_TENSORS:
            raise CheckpointError(path, "header", f"at most {MAX_TENSORS} tensors", "more")
        else:
            entries[name] = _entry(scanner, file, name, base)
    scanner.end()
    _check_layout(file, entries, base)
    return entries, raw


def _entry(scanner: Scanner, file: SourceFile, name: str, base: int) -> Entry:
    found: dict[str, object] = {}
    for key in scanner.keys():  # noqa: SIM118
        if key == "dtype":
            found[key] = scanner.string(16)
        elif key == "shape":
            found[key] = scanner.integers(MAX_DIMENSIONS)
        elif key == "data_offsets":
            found[key] = scanner.integers(2)
        else:
            raise CheckpointError(file.path, f"tensor {name!r}", "a known key", repr(key))
    for key in ("dtype", "shape", "data_offsets"):
        if key not in found:
            raise CheckpointError(file.path, f"tensor {name!r}", key, "nothing")
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if dtype not in _DTYPE_BYTES:
        raise CheckpointError(file.path, f"dtype of {name!r}", ", ".join(_DTYPE_BYTES), dtype)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(file.path, f"data_offsets of {name!r}", "begin <= end", offsets)
    n_bytes = math.prod(shape) * _DTYPE_BYTES[dtype]  # Python integers: cannot wrap
    if n_bytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            file.path, f"size of {name!r}", f"{n_bytes} bytes", offsets[1] - offsets[0]
        )
    return Entry(file, dtype.lower(), shape, base + offsets[0], n_bytes)


def _check_layout(file: SourceFile, entries: dict[str, Entry], base: int) -> None:
    end = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].n_bytes)):
        if entry.begin != end:
            kind = "an overlap" if entry.begin < end else "a hole"
            raise CheckpointError(
                file.path,
                f"tensor {name!r}",
                f"offset {end - base}",
                f"{kind} {entry.begin - base}",
            )
        end = entry.begin + entry.n_bytes
        if end > file.size:
            raise CheckpointError(file.path, f"tensor {name!r}", f"end {file.size}", end)
    if end != file.size:
        raise CheckpointError(file.path, "file size", end, file.size)


def _entry_of_part(whole: Entry, name: str, start: int, stop: int, n_rows: int) -> Entry:
    """The entry of rows start .. stop-1 of `whole`, tensor `name`, which must have `n_rows`."""
    found = math.prod(whole.shape[:-1])
    if len(whole.shape) < 2 or found != n_rows or not start <= stop <= n_rows:
        raise CheckpointError(
            whole.file.path, f"shape of {name!r}", f"{n_rows} rows", list(whole.shape)
        )
    row_bytes = whole.n_bytes // n_rows if n_rows else 0
    begin, n_bytes = whole.begin + start * row_bytes, (stop - start) * row_bytes
    return Entry(whole.file, whole.dtype, (stop - start, whole.shape[-1]), begin, n_bytes)


def read_index(path: Path) -> dict[str, str]:
    """{tensor name: shard file name} of an index; a shard is a plain name beside the index."""
    try:
        text = read_whole(path, MAX_INDEX_BYTES).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise CheckpointError(path, "index", "UTF-8", f"byte {problem.start}") from None
    scanner, shards, weight_map = Scanner(text, path, "index"), {}, None
    for key in scanner.keys():  # noqa: SIM118
        if key == "weight_map":
            weight_map = {}
            for name in scanner.keys():  # noqa: SIM118
                shard = scanner.string(255)
                plain = Path(shard).name == shard and shard not in ("", ".", "..")
                if not plain or "\\" in shard or not shard.isprintable():  # a NUL, half a letter
                    raise CheckpointError(path, f"shard of {name!r}", "a plain name", repr(shard))
                weight_map[name] = shards.setdefault(shard, shard)
                if len(weight_map) > MAX_TENSORS or len(shards) > MAX_SHARDS:
                    raise CheckpointError(path, "weight_map", "a bounded number of names", "more")
        elif scanner.peek() == "{":
            for _ in scanner.keys():  # noqa: SIM118
                scanner.skip_scalar()
        else:
            scanner.skip_scalar()
    scanner.end()
    if not weight_map:
        raise CheckpointError(path, "weight_map", "tensor names", "none")
    return weight_map


class SafetensorsCheckpoint(Checkpoint):
    """See Checkpoint.  `shards` are the files, in the directory of config.json."""

    kind: ClassVar[str] = "safetensors"

    def __init__(self, path: Path, folder: Path, shards: list[Path], index: dict[str, str] | None):
        super().__init__(path)
        self._folder, self._files = folder, []
        self._entries: dict[str, Entry] = {}
        digest = hashlib.sha256()
        with self.closed_on_error():
            for shard in shards:
                file = SourceFile(shard)
                self._files.append(file)
                entries, raw = read_header(file)
                digest.update(raw)
                digest.update(f"|{file.size}|".encode())
                digest.update(sample_digest(file))
                self._add(shard, entries, index)
            for name, shard_name in (index or {}).items():
                if name not in self._entries:
                    raise CheckpointError(path, f"tensor {name!r}", f"in {shard_name}", "nothing")
            self.config = read_json(folder / "config.json")
            self.generation_config = read_json(folder / "generation_config.json")
        digest.update(repr(sorted(self.config.items())).encode())
        self._fingerprint = digest.hexdigest()

    def _add(self, shard: Path, entries: dict[str, Entry], index: dict[str, str] | None) -> None:
        for name, entry in entries.items():
            if name in self._entries:
                raise CheckpointError(shard, f"tensor {name!r}", "in one shard", "in two")
            if index is not None and index.get(name, shard.name) != shard.name:
                raise CheckpointError(shard, f"tensor {name!r}", f"in {index[name]}", "here")
            self._entries[name] = entry

    def require_config(self) -> None:
        """CheckpointError unless a config.json was found, which most layouts cannot do without."""
        if not self.config:
            raise CheckpointError(self._folder / "config.json", "file", "a config", "nothing")

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return {
            name: read_whole(self._folder / name, MAX_TOKENIZER_BYTES)
            for name in TOKENIZER_FILES
            if (self._folder / name).exists()
        }

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        if name in self._entries:
            return True
        part = part_of(name) if isinstance(name, str) else None
        return part is not None and part[0] in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        return self._entry(name).dtype

    def _entry(self, name: str) -> Entry:
        if name in self._entries:
            return self._entries[name]
        part = part_of(name)
        if part is None or part[0] not in self._entries:
            raise CheckpointError(self.path, f"tensor {name!r}", "a tensor", "nothing")
        return _entry_of_part(self._entries[part[0]], *part)

    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        self.check_open()
        entry = self._entry(name)
        if entry.dtype not in STORAGE_DTYPES:
            raise UnsupportedError(f"{self.path}: tensor {name!r} has type {entry.dtype.upper()}")
        assert entry.shape and 0 <= start <= stop <= entry.shape[0], (name, start, stop)
        row_bytes = entry.n_bytes // entry.shape[0] if entry.shape[0] else 0
        values = np.empty((stop - start, *entry.shape[1:]), STORAGE_DTYPES[entry.dtype])
        if values.nbytes:
            entry.file.read_into(entry.begin + start * row_bytes, memoryview(values).cast("B"))
        return values

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def files(self) -> list[Path]:
        return [file.path for file in self._files]

    @property
    def n_bytes(self) -> int:
        return sum(entry.n_bytes for entry in self._entries.values())

    def close(self) -> None:
        super().close()
        for file in self._files:
            file.close()
