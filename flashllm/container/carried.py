"""What a container carries beside its planes: vectors and blobs, kept in memory until the end."""

from __future__ import annotations

import hashlib

import numpy as np

from .._core import xxh64
from ..errors import UsageError
from ..units import align_up, format_size
from .base import (
    BLOB_NAME,
    MAX_BLOB_BYTES,
    MAX_BLOB_NAME,
    MAX_BLOBS,
    MAX_NAME,
    MAX_VECTOR_LENGTH,
    MAX_VECTORS_BYTES,
    NAME,
    SECTION_ALIGNMENT,
    SMALL_ALIGNMENT,
    Blob,
    Vector,
    Vectors,
    frame_seed,
    is_name,
)
from .partial import PartialFile


class Carried:
    """Collects vectors and blobs (FORMAT.md sections 6, 7) and writes their sections."""

    def __init__(self) -> None:
        self._vectors: dict[str, np.ndarray] = {}
        self._blobs: dict[str, bytes] = {}

    def add_vector(self, name: str, values: np.ndarray) -> None:
        array = np.ascontiguousarray(values, "<f4")
        if not is_name(name, NAME, MAX_NAME) or name in self._vectors:
            raise UsageError(f"vector {name!r}: a bad name, or given twice")
        if array.ndim != 1 or not 1 <= array.size <= MAX_VECTOR_LENGTH:
            raise UsageError(f"vector {name}: one dimension is needed, not {array.shape}")
        if not np.isfinite(array).all():
            raise UsageError(f"vector {name}: holds inf or nan")
        if array.nbytes + sum(other.nbytes for other in self._vectors.values()) > MAX_VECTORS_BYTES:
            raise UsageError(f"vector {name}: more than {format_size(MAX_VECTORS_BYTES)} in all")
        self._vectors[name] = array

    def add_blob(self, name: str, data: bytes) -> None:
        if not is_name(name, BLOB_NAME, MAX_BLOB_NAME) or name in self._blobs:
            raise UsageError(f"blob {name!r}: a bad name, or given twice")
        if len(data) > MAX_BLOB_BYTES or len(self._blobs) == MAX_BLOBS:
            raise UsageError(f"blob {name}: {format_size(len(data))} is too large, or too many")
        self._blobs[name] = bytes(data)

    def write(self, file: PartialFile, file_id: int) -> tuple[Vectors, tuple[Blob, ...]]:
        """Append both sections to `file`; where everything lies."""
        return self._write_vectors(file, file_id), self._write_blobs(file)

    def _write_vectors(self, file: PartialFile, file_id: int) -> Vectors:
        if not self._vectors:
            return Vectors()
        tensors, section = [], bytearray()
        for name, array in self._vectors.items():
            section += bytes(align_up(len(section), SMALL_ALIGNMENT) - len(section))
            tensors.append(Vector(name, array.size, len(section)))
            section += array.tobytes()
        offset = align_up(file.end, SECTION_ALIGNMENT)
        file.put(offset, section)
        digest = xxh64(section, frame_seed(file_id, offset))
        return Vectors(offset, len(section), digest, tuple(tensors))

    def _write_blobs(self, file: PartialFile) -> tuple[Blob, ...]:
        blobs, alignment = [], SECTION_ALIGNMENT
        for name, data in self._blobs.items():
            offset, alignment = align_up(file.end, alignment), SMALL_ALIGNMENT
            file.put(offset, data)
            blobs.append(Blob(name, offset, len(data), hashlib.sha256(data).hexdigest()))
        return tuple(blobs)
