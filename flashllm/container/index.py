"""The index (FORMAT.md sections 1, 4): read in bounded steps, held against the layout, frozen.

The index is hashed before it is parsed and its frame tables are checked before memory for them is
taken, in steps of 1 MiB: a file cannot make us hold more than a step of what turns out wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from ..errors import FormatError
from ..regular import drop_page_cache, read_exactly
from ..units import align_up
from .base import (
    FRAME_ROW,
    SECTION_ALIGNMENT,
    SMALL_ALIGNMENT,
    Blob,
    Plane,
    PlaneShape,
    Vectors,
)
from .header import Superblock
from .manifest import Manifest, parse_manifest

_STEP_FRAMES = 2**20 // FRAME_ROW.itemsize


@dataclass(frozen=True)
class Index:
    """Everything a container says about itself, checked."""

    family: str
    config: dict
    meta: dict
    planes: dict[str, Plane]
    vectors: Vectors
    blobs: dict[str, Blob]


def read_index(fd: int, path: object, superblock: Superblock) -> Index:
    """The index that `superblock` locates, or FormatError."""
    _check_sha256(fd, path, superblock)
    at = superblock.index_offset
    raw = read_exactly(fd, path, at, superblock.manifest_bytes, "manifest")
    manifest = parse_manifest(path, raw)
    n_frames = sum(shape.n_frames for shape, _ in manifest.planes)
    expected = superblock.manifest_bytes + n_frames * FRAME_ROW.itemsize
    if expected != superblock.index_bytes:
        raise FormatError(
            path, "index", f"{expected} bytes for {n_frames} frames", superblock.index_bytes
        )
    for _ in _checked_steps(fd, path, superblock, manifest):
        pass
    planes = _load_planes(fd, path, superblock, manifest)
    drop_page_cache(fd, at, superblock.index_bytes)
    return Index(
        family=manifest.family,
        config=manifest.config,
        meta=manifest.meta,
        planes=planes,
        vectors=manifest.vectors,
        blobs={blob.name: blob for blob in manifest.blobs},
    )


def _check_sha256(fd: int, path: object, superblock: Superblock) -> None:
    digest, done = hashlib.sha256(), 0
    while done < superblock.index_bytes:
        n = min(2**20, superblock.index_bytes - done)
        digest.update(read_exactly(fd, path, superblock.index_offset + done, n, "index"))
        done += n
    if digest.digest() != superblock.index_sha256:
        expected = f"sha256 {superblock.index_sha256.hex()}"
        raise FormatError(path, "index", expected, digest.hexdigest())


def _checked_steps(
    fd: int, path: object, superblock: Superblock, manifest: Manifest
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(plane number, first frame, rows) of all tables, each held against the layout.

    Runs to the end of the file's sections and raises FormatError where the layout is broken.
    """
    table = superblock.index_offset + superblock.manifest_bytes
    end = SECTION_ALIGNMENT  # of the superblock's section
    for number, (shape, offset) in enumerate(manifest.planes):
        _expect(path, f"plane {shape.name} offset", align_up(end, SECTION_ALIGNMENT), offset)
        end = offset
        for first in range(0, shape.n_frames, _STEP_FRAMES):
            n = min(_STEP_FRAMES, shape.n_frames - first)
            raw = read_exactly(fd, path, table, n * FRAME_ROW.itemsize, f"table of {shape.name}")
            rows = np.frombuffer(raw, FRAME_ROW)
            end = _check_frames(path, shape, first, rows, end, superblock)
            yield number, first, rows
            table += len(raw)
    end = _check_vectors(path, manifest.vectors, end)
    end = _check_blobs(path, manifest.blobs, end)
    _expect(path, "index offset", align_up(end, SECTION_ALIGNMENT), superblock.index_offset)


def _check_frames(
    path: object,
    shape: PlaneShape,
    first: int,
    rows: np.ndarray,
    end: int,
    superblock: Superblock,
) -> int:
    """Hold frames `first` … of a plane against the layout that begins at `end`; the new end."""
    offsets, stored = rows["offset"], rows["stored"].astype(np.uint64)
    least = shape.frame_bytes if shape.codec == "raw" else 1

    def fail(where: str, bad: np.ndarray, expected: object, found: np.ndarray) -> None:
        if bad.any():
            at = int(bad.argmax())
            value = expected[at] if isinstance(expected, np.ndarray) else expected
            where = f"plane {shape.name} frame {first + at} {where}"
            raise FormatError(path, where, value, int(found[at]))

    # Sizes and offsets are bounded first; then no sum below can pass 2^61.
    most = f"{least} to {shape.frame_bytes} bytes"
    fail("stored", (stored < least) | (stored > shape.frame_bytes), most, stored)
    fail("offset", offsets > superblock.file_bytes, "an offset in the file", offsets)
    alignment = np.uint64(superblock.alignment)
    ends = offsets + stored
    following = (ends + alignment - np.uint64(1)) // alignment * alignment
    expected = np.empty_like(offsets)
    expected[0] = align_up(end, superblock.alignment)
    expected[1:] = following[:-1]
    fail("offset", offsets != expected, expected, offsets)
    return int(ends[-1])


def _check_vectors(path: object, vectors: Vectors, end: int) -> int:
    if not vectors.tensors:
        for field in fields(vectors):
            if field.name != "tensors":
                _expect(path, f"vectors {field.name}", 0, getattr(vectors, field.name))
        return end
    _expect(path, "vectors offset", align_up(end, SECTION_ALIGNMENT), vectors.offset)
    inside = 0
    for vector in vectors.tensors:
        expected = align_up(inside, SMALL_ALIGNMENT)
        _expect(path, f"vector {vector.name} offset", expected, vector.offset)
        inside = vector.offset + 4 * vector.length
    _expect(path, "vectors bytes", inside, vectors.n_bytes)
    return vectors.offset + vectors.n_bytes


def _check_blobs(path: object, blobs: tuple[Blob, ...], end: int) -> int:
    alignment = SECTION_ALIGNMENT
    for blob in blobs:
        _expect(path, f"blob {blob.name} offset", align_up(end, alignment), blob.offset)
        end, alignment = blob.offset + blob.n_bytes, SMALL_ALIGNMENT
    return end


def _expect(path: object, where: str, expected: int, found: int) -> None:
    if expected != found:
        raise FormatError(path, where, expected, found)


def _load_planes(
    fd: int, path: object, superblock: Superblock, manifest: Manifest
) -> dict[str, Plane]:
    columns = {"offset": np.uint64, "stored": np.uint32, "digest": np.uint64}
    tables = [
        {name: np.empty(shape.n_frames, kind) for name, kind in columns.items()}
        for shape, _ in manifest.planes
    ]
    for number, first, rows in _checked_steps(fd, path, superblock, manifest):
        for name, array in tables[number].items():
            array[first : first + len(rows)] = rows[name]
    planes = {}
    for (shape, _), table in zip(manifest.planes, tables, strict=True):
        for array in table.values():
            array.flags.writeable = False
        given = {field.name: getattr(shape, field.name) for field in fields(shape)}
        planes[shape.name] = Plane(
            **given,
            file_id=superblock.file_id,
            offsets=table["offset"],
            stored=table["stored"],
            digests=table["digest"],
        )
    return planes
