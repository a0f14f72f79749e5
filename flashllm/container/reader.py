"""Opening a container: superblock, index, and the parts that are read whole.

`open_container` believes nothing (header.py, manifest.py, index.py do the distrusting); the
Container it returns is believed by everyone.  Frames are read by the storage room at the offsets
that the planes give.
"""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from .._core import xxh64
from ..errors import ChecksumError, ClosedError, FlashReadError, FormatError, UsageError
from ..regular import drop_page_cache, expect_no_readahead, open_regular, read_exactly, read_into
from .base import Blob, Plane, frame_seed
from .header import HEADER_BYTES, Superblock, parse_superblock
from .index import Index, read_index


def open_container(path: str | os.PathLike) -> Container:
    """The container at `path`.

    Raises FormatError where the file breaks the format, UnsupportedError for another version,
    FlashReadError when it cannot be read.  Reads the superblock and the index only.
    """
    path = Path(path)
    fd = open_regular(path)
    try:
        expect_no_readahead(fd)
        size = os.fstat(fd).st_size
        if size == 0:
            raise FormatError(path, "file size", f"at least {HEADER_BYTES} bytes", "an empty file")
        raw = read_exactly(fd, path, 0, min(size, HEADER_BYTES), "superblock")
        drop_page_cache(fd, 0, HEADER_BYTES)
        superblock = parse_superblock(path, raw, file_bytes=size)
        index = read_index(fd, path, superblock)
    except BaseException:
        os.close(fd)
        raise
    return Container(path, fd, superblock, index)


def _identity(fd: int) -> tuple[int, ...]:
    """What tells one state of a file from another: device, inode, size, time of change."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Container:
    """An accepted container.  Close it, or use it in a `with`; planes stay valid afterwards.

    `path`, `size`, `alignment`, `family`, `config`, `meta`; `digest` (hex sha256 of the index,
    which holds the digest of everything else: equal digests are equal models); `file_id`; `planes`
    (name -> Plane, in model order); `vectors` (name -> (shape, offset in the file)); `blobs`
    (name -> Blob).  Safe to use from several threads.
    """

    def __init__(self, path: Path, fd: int, superblock: Superblock, index: Index):
        self.path = path
        self.size = superblock.file_bytes
        self.file_id = superblock.file_id
        self.alignment = superblock.alignment
        self.digest = superblock.index_sha256.hex()
        self.superblock = superblock
        self.family: str = index.family
        self.config: dict = index.config
        self.meta: dict = index.meta
        self.planes: dict[str, Plane] = index.planes
        self.blobs: dict[str, Blob] = index.blobs
        self.vectors: dict[str, tuple[tuple[int], int]] = {
            vector.name: ((vector.length,), index.vectors.offset + vector.offset)
            for vector in index.vectors.tensors
        }
        self.vectors_section = index.vectors
        self._fd: int | None = fd
        self._opened = _identity(fd)

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.close()

    def close(self) -> None:
        """Close the file; doing so again is nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):  # of a file system that is gone: nothing was written
                os.close(fd)

    def fileno(self) -> int:
        if self._fd is None:
            raise ClosedError(f"{self.path}: this container was closed")
        return self._fd

    def check_same_file(self, fd: int) -> None:
        """FlashReadError unless `fd` is this very file, neither replaced nor changed since."""
        if _identity(fd) != self._opened:
            why = "the file was replaced or changed since it was opened"
            raise FlashReadError(errno.ESTALE, why, self.path, 0)

    @property
    def index_bytes(self) -> int:
        """Bytes of the frame tables that the planes keep in memory, for the ledger."""
        arrays = ((p.offsets, p.stored, p.digests) for p in self.planes.values())
        return sum(array.nbytes for plane in arrays for array in plane)

    def load_vectors(self) -> dict[str, np.ndarray]:
        """All vectors, verified: name -> float32[length].  They share one allocation."""
        section = self.vectors_section
        data = np.empty(section.n_bytes, np.uint8)
        read_into(self.fileno(), self.path, section.offset, memoryview(data), "vectors")
        drop_page_cache(self.fileno(), section.offset, section.n_bytes)
        if section.n_bytes:
            found = xxh64(data, frame_seed(self.file_id, section.offset))
            if found != section.digest:
                raise ChecksumError(self.path, "vectors", section.digest, found)
        loaded = {}
        for vector in section.tensors:
            end = vector.offset + 4 * vector.length
            values = data[vector.offset : end].view("<f4")
            if not np.isfinite(values).all():
                raise FormatError(self.path, f"vector {vector.name}", "finite values", "inf or nan")
            loaded[vector.name] = values
        return loaded

    def read_blob(self, name: str) -> bytes:
        """The bytes of a carried file, verified; UsageError if there is none of this name."""
        blob = self.blobs.get(name)
        if blob is None:
            known = ", ".join(self.blobs) or "none"
            raise UsageError(f"{self.path} carries no {name!r}; it carries: {known}")
        raw = read_exactly(self.fileno(), self.path, blob.offset, blob.n_bytes, f"blob {name}")
        drop_page_cache(self.fileno(), blob.offset, blob.n_bytes)
        found = hashlib.sha256(raw).hexdigest()
        if found != blob.sha256:
            raise FormatError(self.path, f"blob {name}", f"sha256 {blob.sha256}", found)
        return raw

    def summary(self) -> dict:
        """What `inspect` shows: plain values, ready for JSON."""
        planes = [
            {
                "name": plane.name,
                "kind": plane.kind,
                "n_items": plane.n_items,
                "pieces": {p.name: f"{p.weight_type}[{p.n_cols}]" for p in plane.pieces},
                "parts": {name: list(run) for name, run in plane.parts.items()},
                "codec": plane.codec,
                "per_frame": plane.per_frame,
                "frame_bytes": plane.frame_bytes,
                "n_frames": plane.n_frames,
                "decoded_bytes": plane.n_frames * plane.frame_bytes,
                "stored_bytes": int(plane.stored.sum(dtype=np.uint64)),
                "file_bytes": plane.stored_bytes,
            }
            for plane in self.planes.values()
        ]
        return {
            "path": str(self.path),
            "size": self.size,
            "digest": self.digest,
            "file_id": f"{self.file_id:016x}",
            "alignment": self.alignment,
            "family": self.family,
            "config": self.config,
            "meta": self.meta,
            "planes": planes,
            "vectors": {
                "count": len(self.vectors),
                "bytes": self.vectors_section.n_bytes,
            },
            "blobs": {name: blob.n_bytes for name, blob in self.blobs.items()},
            "index_bytes": self.superblock.index_bytes,
        }
