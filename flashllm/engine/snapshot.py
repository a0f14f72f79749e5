"""A sequence's memory taken out of the engine: to keep, to copy, to write down and to go on from.

A snapshot is immutable and belongs to one container: another one's digest refuses it.  As bytes it
is a magic, the length and text of a JSON header, the arrays one after another, and the SHA-256 of
everything before; a file is believed only if all of that fits together.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..durable import WholeFile
from ..errors import FormatError
from ..regular import open_regular, read_exactly

_MAGIC, _LENGTH, _DIGEST_BYTES = b"FLSTATE1", struct.Struct("<I"), 32
_MAX_HEADER_BYTES, _MAX_ARRAYS = 2**20, 16
_DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Snapshot:
    """`length` tokens are in `arrays`; `pending` were said and not taken in yet (the last token of
    a completion is one), and come before whatever is said next."""

    model: str
    length: int
    pending: tuple[int, ...]
    arrays: Mapping[str, np.ndarray]

    @property
    def n_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def copy(self) -> Snapshot:
        copies = {name: array.copy() for name, array in self.arrays.items()}
        return Snapshot(self.model, self.length, self.pending, copies)

    def to_bytes(self) -> bytes:
        shapes = {name: [str(a.dtype), *a.shape] for name, a in self.arrays.items()}
        header = json.dumps(
            {"model": self.model, "length": self.length, "pending": self.pending, "arrays": shapes}
        ).encode()
        parts = [_MAGIC, _LENGTH.pack(len(header)), header]
        parts += [np.ascontiguousarray(a).tobytes() for a in self.arrays.values()]
        body = b"".join(parts)
        return body + hashlib.sha256(body).digest()

    def save(self, path: str | os.PathLike) -> None:
        """Write to `path`, whole or not at all."""
        with WholeFile(path) as out:
            out.file.write(self.to_bytes())
            out.commit()

    @classmethod
    def load(cls, path: str | os.PathLike) -> Snapshot:
        """As `from_bytes`; FlashReadError for what cannot be read."""
        fd = open_regular(path)
        try:
            size = os.fstat(fd).st_size
            start = len(_MAGIC) + _LENGTH.size
            head = read_exactly(fd, path, 0, min(size, start), "first bytes")
            n_header = _header_bytes(head, size, path)
            text = read_exactly(fd, path, start, n_header, "header")
            # Before there is memory for them: the arrays it names are as large as the file.
            _expect_size(_header(text, path)[-1], start + n_header, size, path)
            return cls.from_bytes(read_exactly(fd, path, 0, size, "state"), path=path)
        finally:
            os.close(fd)

    @classmethod
    def from_bytes(cls, raw: bytes, *, path: object = "state") -> Snapshot:
        """FormatError for anything that `to_bytes` does not write."""
        start = len(_MAGIC) + _LENGTH.size
        n_header = _header_bytes(raw[:start], len(raw), path)
        body = memoryview(raw)[:-_DIGEST_BYTES]
        if hashlib.sha256(body).digest() != raw[-_DIGEST_BYTES:]:
            raise FormatError(path, "SHA-256", "that of the content", "another")
        model, length, pending, shapes = _header(bytes(body[start : start + n_header]), path)
        arrays, at = {}, start + n_header
        _expect_size(shapes, at, len(raw), path)
        for name, (dtype, *shape) in shapes.items():
            n_values = math.prod(shape)
            values = np.frombuffer(body, dtype, n_values, at) if n_values else np.empty(0, dtype)
            arrays[name] = values.reshape(shape)
            at += values.nbytes
        return cls(model, length, pending, arrays)


def _header_bytes(head: bytes, size: int, path: object) -> int:
    """What the first bytes of a state of `size` say of its header's length."""
    start = len(_MAGIC) + _LENGTH.size
    if size < start + _DIGEST_BYTES or not head.startswith(_MAGIC):
        raise FormatError(path, "first bytes", _MAGIC, head[:8])
    (n_header,) = _LENGTH.unpack_from(head, len(_MAGIC))
    most = min(_MAX_HEADER_BYTES, size - start - _DIGEST_BYTES)
    if n_header > most:
        raise FormatError(path, "header length", f"at most {most}", n_header)
    return n_header


def _expect_size(shapes: Mapping[str, list], start: int, size: int, path: object) -> None:
    """FormatError unless arrays of these shapes, from `start` on, are all of the file."""
    end = start + sum(
        math.prod(shape) * np.dtype(dtype).itemsize for dtype, *shape in shapes.values()
    )
    if end + _DIGEST_BYTES != size:
        raise FormatError(path, "size", end + _DIGEST_BYTES, size)


def _header(text: bytes, path: object) -> tuple[str, int, tuple[int, ...], dict[str, list]]:
    if text.count(b"[") + text.count(b"{") > 4 * _MAX_ARRAYS:  # a list takes 20 times its brackets
        raise FormatError(path, "header", "few brackets", text[:80])
    try:
        header = json.loads(text)
        model, length, pending = header["model"], header["length"], header["pending"]
        shapes = header["arrays"]
        good = (
            isinstance(model, str)
            and _is_count(length)
            and isinstance(pending, list)
            and all(map(_is_count, pending))
            and isinstance(shapes, dict)
            and len(shapes) <= _MAX_ARRAYS
            and all(dtype in _DTYPES and all(map(_is_count, shape)) and len(shape) <= 8
                    for dtype, *shape in shapes.values())
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        raise FormatError(path, "header", "a state's header", str(problem)[:80]) from None
    if not good:
        raise FormatError(path, "header", "counts and float arrays", text[:80])
    return model, length, tuple(pending), shapes


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40
