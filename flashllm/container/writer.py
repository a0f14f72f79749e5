"""Writing a container: front to back, frame by frame, whole or not at all.

Memory: one frame and one batch of stored frames (BATCH_BYTES), the frame tables, and the vectors
and blobs that were given.  Nothing has the final name before everything is on the disk; what was
written before a kill is used by the next run of the same conversion (journal.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .._core import xxh64
from ..codecs import CODECS, Encoder
from ..errors import BusyError, ConversionError, UsageError
from ..units import MIB, align_up, format_size
from .base import (
    ALIGNMENTS,
    BLOB_NAME,
    FAMILY,
    FRAME_ROW,
    MAX_BLOB_BYTES,
    MAX_BLOB_NAME,
    MAX_BLOBS,
    MAX_FAMILY,
    MAX_NAME,
    MAX_VECTOR_LENGTH,
    NAME,
    SECTION_ALIGNMENT,
    SMALL_ALIGNMENT,
    Blob,
    Piece,
    PlaneShape,
    Vector,
    Vectors,
    frame_seed,
    is_name,
)
from .files import drop_page_cache, sync_directory, write_all
from .header import HEADER_BYTES, Superblock
from .journal import Journal, WrittenPlane
from .manifest import Manifest, canonical_json
from .reader import open_container

BATCH_BYTES = MIB
# Dirty pages are charged to us until they are on the disk and dropped.
SYNC_BYTES = 64 * MIB

_FRAME = struct.Struct("<QIQ")
assert _FRAME.size == FRAME_ROW.itemsize


def make_file_id(source: str, options: Mapping) -> int:
    """The file id of a conversion: equal for equal input, different otherwise."""
    text = canonical_json({"source": source, "options": dict(options)})
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


class ContainerWriter:
    """Writes the container `path`.  One thread.

        with ContainerWriter(path, family="llama", config=config, source=digest) as writer:
            if writer.begin_plane("embed", "rows", pieces, n_items=…, per_frame=…, codec="raw"):
                writer.write_items(items)   # uint8[k, stride], as often as needed
                writer.end_plane()
            writer.add_vectors({"final_norm.weight": values})
            writer.add_blob("tokenizer.json", data)
            writer.commit()

    `begin_plane` is False for a plane that an interrupted run of the same conversion (same
    `source`, `options`, `family`, `config`, `alignment`) has already finished; go on with the next
    one.  Leaving the `with` without `commit` keeps what was written for the next run; `abort`
    removes it.  `meta` may be changed until `commit`.

    Raises UsageError for what the format cannot hold, or if `path` exists and not `overwrite`;
    BusyError when another process is writing it; ConversionError when the disk is full (or has less
    than `estimate_bytes` free at the start) or fails.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        family: str,
        config: Mapping,
        alignment: int = 4096,
        source: str = "",
        options: Mapping | None = None,
        meta: Mapping | None = None,
        overwrite: bool = False,
        estimate_bytes: int = 0,
    ):
        self.path = Path(path)
        if alignment not in ALIGNMENTS:
            raise UsageError(f"alignment must be one of {ALIGNMENTS}, not {alignment!r}")
        if not is_name(family, FAMILY, MAX_FAMILY):
            raise UsageError(f"a family is named like {FAMILY.pattern}, not {family!r}")
        identity = {
            "alignment": alignment,
            "config": dict(config),
            "family": family,
            "file_id": make_file_id(source, options or {}),
            "options": dict(options or {}),
            "source": source,
        }
        # What JSON cannot say is refused now, not after an hour; tuples become lists.
        self._identity = json.loads(canonical_json(identity))
        self.family, self.config, self.alignment = family, self._identity["config"], alignment
        self.file_id = self._identity["file_id"]
        self.meta = dict(meta or {})
        self._overwrite = overwrite
        self._check_target()
        self._vectors: dict[str, np.ndarray] = {}
        self._blobs: dict[str, bytes] = {}
        self._planes: list[WrittenPlane] = []
        self._resumed: list[WrittenPlane] = []  # of an earlier run, not yet asked for again
        self._end = self._synced = SECTION_ALIGNMENT  # of what is in the file or in the batch
        self._batch = bytearray()
        self._open: _OpenPlane | None = None
        self._fd: int | None = None
        self._journal = Journal(self.partial_path.with_name(self.partial_path.name + ".journal"))
        self._lock_partial()
        try:
            with self._reported():
                self._resume()
            self._check_space(estimate_bytes)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------- opening

    @property
    def partial_path(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    def _check_target(self) -> None:
        if self.path.is_dir():
            raise UsageError(f"{self.path} is a directory")
        if not self._overwrite and os.path.lexists(self.path):
            raise UsageError(f"{self.path} exists; pass overwrite=True to replace it")

    def _lock_partial(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        try:
            self._fd = os.open(self.partial_path, flags, 0o644)
        except OSError as error:
            raise ConversionError(f"{self.partial_path}: {error.strerror}") from error
        import fcntl

        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise BusyError(f"{self.partial_path}: another process is writing it") from error

    def _resume(self) -> None:
        """Keep the planes of an earlier run that are intact, cut off the rest."""
        end = SECTION_ALIGNMENT
        for plane in self._journal.load(self._identity):
            placed = plane.offset == align_up(end, SECTION_ALIGNMENT)
            if not placed or not plane.is_intact(self._fd, self.partial_path, self.file_id):
                break
            self._resumed.append(plane)
            end = plane.end
        self._journal.start(self._identity, self._resumed)
        self._end = self._synced = end
        os.ftruncate(self._fd, end if self._resumed else 0)
        write_all(self._fd, 0, memoryview(bytes(HEADER_BYTES)))  # of a run killed in its commit

    def _check_space(self, estimate_bytes: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        needed = estimate_bytes - self._end
        if needed > free:
            raise ConversionError(
                f"{self.path}: about {format_size(needed)} are needed on this disk, "
                f"{format_size(free)} are free"
            )

    # -------------------------------------------------------------------------------- planes

    def is_finished(self, name: str) -> bool:
        """Whether this plane is written, by this run or by one that was interrupted."""
        return any(plane.shape.name == name for plane in (*self._planes, *self._resumed))

    def begin_plane(
        self,
        name: str,
        kind: str,
        pieces: Iterable[Piece],
        n_items: int,
        per_frame: int,
        codec: str = "raw",
        parts: Mapping[str, tuple[int, int]] | None = None,
    ) -> bool:
        """Begin the next plane; False if it is there already and its items must not be written.

        `pieces` as `lay_out_pieces` makes them; `parts` name -> (start, stop).
        """
        self._check_open()
        if self._open:
            raise UsageError(f"plane {self._open.shape.name} was not ended")
        runs = {part: (int(start), int(stop)) for part, (start, stop) in (parts or {}).items()}
        shape = PlaneShape(name, kind, n_items, per_frame, codec, tuple(pieces), runs)
        problem = shape.problem()
        if problem:
            where, expected, found = problem
            raise UsageError(f"plane {name}: {where}: expected {expected}, found {found}")
        if any(plane.shape.name == name for plane in self._planes):
            raise UsageError(f"plane {name} was written already")
        if self._resumed:
            if self._resumed[0].shape == shape:
                self._planes.append(self._resumed.pop(0))
                return False
            self._forget_resumed()
        self._open = _OpenPlane(shape, align_up(self._end, SECTION_ALIGNMENT))
        return True

    def _forget_resumed(self) -> None:
        """The conversion took another turn than the interrupted one: cut off what differs."""
        self._resumed = []
        self._end = self._planes[-1].end if self._planes else SECTION_ALIGNMENT
        self._synced = min(self._synced, self._end)
        os.ftruncate(self._fd, self._end if self._planes else HEADER_BYTES)
        self._journal.close()
        self._journal.start(self._identity, self._planes)

    def write_items(self, items: np.ndarray) -> None:
        """Append `items` uint8[k, stride] to the open plane; any k; zeros between pieces."""
        self._check_open()
        plane = self._open
        if plane is None:
            raise UsageError("write_items without a plane that was begun")
        shape = plane.shape
        if items.ndim != 2 or items.dtype != np.uint8 or items.shape[1] != shape.stride:
            found = f"{items.dtype}{list(items.shape)}"
            raise UsageError(f"plane {shape.name} takes uint8[k, {shape.stride}], not {found}")
        if any(items[:, start:stop].any() for start, stop in shape.gaps):
            raise UsageError(f"plane {shape.name}: bytes between pieces must be zero")
        if plane.n_items + len(items) > shape.n_items:
            raise UsageError(
                f"plane {shape.name} has {shape.n_items} items, not {plane.n_items + len(items)}"
            )
        for frame in plane.frames_of(np.ascontiguousarray(items)):
            self._write_frame(plane, frame)

    def end_plane(self) -> None:
        """Finish the open plane; UsageError if items are missing."""
        self._check_open()
        plane = self._open
        if plane is None:
            raise UsageError("end_plane without a plane that was begun")
        if plane.n_items != plane.shape.n_items:
            raise UsageError(
                f"plane {plane.shape.name} has {plane.n_items} of {plane.shape.n_items} items"
            )
        last = plane.last_frame()
        if last is not None:
            self._write_frame(plane, last)
        self._flush()
        written = WrittenPlane(plane.shape, plane.offset, bytes(plane.table))
        with self._reported():
            self._journal.note(written)
        self._planes.append(written)
        self._open = None

    def _write_frame(self, plane: _OpenPlane, frame: np.ndarray) -> None:
        stored = plane.encoder.encode(memoryview(frame).cast("B"))
        at = SECTION_ALIGNMENT if not plane.table else self.alignment
        offset = align_up(self._end, at)
        self._put(offset, stored)
        digest = xxh64(stored, frame_seed(self.file_id, offset))
        plane.table += _FRAME.pack(offset, len(stored), digest)

    # ------------------------------------------------------------------------- vectors, blobs

    def add_vectors(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Carry 1-D tensors as float32 (kept in memory until `commit`)."""
        self._check_open()
        for name, values in vectors.items():
            array = np.ascontiguousarray(values, "<f4")
            if not is_name(name, NAME, MAX_NAME) or name in self._vectors:
                raise UsageError(f"vector {name!r}: a bad name, or given twice")
            if array.ndim != 1 or not 1 <= array.size <= MAX_VECTOR_LENGTH:
                raise UsageError(f"vector {name}: one dimension is needed, not {array.shape}")
            if not np.isfinite(array).all():
                raise UsageError(f"vector {name}: holds inf or nan")
            self._vectors[name] = array

    def add_blob(self, name: str, data: bytes) -> None:
        """Carry a file verbatim."""
        self._check_open()
        if not is_name(name, BLOB_NAME, MAX_BLOB_NAME) or name in self._blobs:
            raise UsageError(f"blob {name!r}: a bad name, or given twice")
        if len(data) > MAX_BLOB_BYTES or len(self._blobs) == MAX_BLOBS:
            raise UsageError(f"blob {name}: {format_size(len(data))} is too large, or too many")
        self._blobs[name] = bytes(data)

    def _write_vectors(self) -> Vectors:
        if not self._vectors:
            return Vectors()
        tensors, section = [], bytearray()
        for name, array in self._vectors.items():
            section += bytes(align_up(len(section), SMALL_ALIGNMENT) - len(section))
            tensors.append(Vector(name, array.size, len(section)))
            section += array.tobytes()
        offset = align_up(self._end, SECTION_ALIGNMENT)
        self._put(offset, section)
        digest = xxh64(section, frame_seed(self.file_id, offset))
        return Vectors(offset, len(section), digest, tuple(tensors))

    def _write_blobs(self) -> tuple[Blob, ...]:
        blobs, alignment = [], SECTION_ALIGNMENT
        for name, data in self._blobs.items():
            offset, alignment = align_up(self._end, alignment), SMALL_ALIGNMENT
            self._put(offset, data)
            blobs.append(Blob(name, offset, len(data), hashlib.sha256(data).hexdigest()))
        return tuple(blobs)

    # -------------------------------------------------------------------------------- finish

    def commit(self) -> str:
        """Finish the file and give it its name; returns its digest (Container.digest).

        ConversionError if anything fails; after a failed fsync nothing is left.
        """
        self._check_open()
        if self._open:
            raise UsageError(f"plane {self._open.shape.name} was not ended")
        if self._resumed:
            self._forget_resumed()
        vectors, blobs = self._write_vectors(), self._write_blobs()
        planes = tuple((plane.shape, plane.offset) for plane in self._planes)
        manifest = Manifest(self.family, self.config, self.meta, planes, vectors, blobs).encode()
        sha256 = hashlib.sha256(manifest)
        offset = align_up(self._end, SECTION_ALIGNMENT)
        self._put(offset, manifest)
        for plane in self._planes:
            sha256.update(plane.table)
            self._put(self._end, plane.table)
        self._flush()
        superblock = Superblock(
            file_id=self.file_id,
            file_bytes=self._end,
            alignment=self.alignment,
            index_offset=offset,
            index_bytes=self._end - offset,
            manifest_bytes=len(manifest),
            index_sha256=sha256.digest(),
        )
        with self._reported():
            write_all(self._fd, 0, memoryview(superblock.pack()))
        self._sync(os.fsync)
        open_container(self.partial_path).close()  # no file is named that would not open
        self._check_target()
        with self._reported():
            os.replace(self.partial_path, self.path)
            # Finished containers are never modified.
            os.fchmod(self._fd, stat.S_IMODE(os.fstat(self._fd).st_mode) & 0o444)
        self._journal.remove()
        self.close()
        try:
            sync_directory(self.path.parent)
        except OSError as error:
            self.path.unlink()
            raise ConversionError(f"{self.path}: sync of its directory: {error}") from error
        return superblock.index_sha256.hex()

    def abort(self) -> None:
        """Give up: remove the partial file and its journal."""
        if self._fd is not None:
            self.partial_path.unlink(missing_ok=True)
            self._journal.remove()
        self.close()

    def close(self) -> None:
        """Stop here; what is finished stays for the next run.  Doing so again is nothing."""
        self._journal.close()
        self._open = None
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> ContainerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------- bytes

    def _check_open(self) -> None:
        if self._fd is None:
            raise UsageError(f"{self.path}: this writer is closed")

    def _put(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Append zeros up to `offset`, then `data`."""
        self._batch += bytes(offset - self._end)
        self._batch += data
        self._end = offset + len(data)
        if len(self._batch) >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        with self._reported():
            write_all(self._fd, self._end - len(self._batch), memoryview(self._batch))
        self._batch = bytearray()
        if self._end - self._synced >= SYNC_BYTES:
            self._sync(getattr(os, "fdatasync", os.fsync))

    def _sync(self, sync) -> None:
        try:
            sync(self._fd)
        except OSError as error:
            # The kernel may have dropped the pages that it could not write: nothing in the file
            # can be trusted, and asking again would succeed without cause.
            self.abort()
            raise ConversionError(f"{self.path}: sync failed: {error.strerror}") from error
        drop_page_cache(self._fd, self._synced, self._end - self._synced)
        self._synced = self._end

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turns the system's errors while writing into ConversionError."""
        try:
            yield
        except OSError as error:
            kept = f"{self.partial_path} is kept: run again to go on, or delete it"
            why = error.strerror
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                why = f"the disk is full at {format_size(self._end)}"
            raise ConversionError(f"{self.path}: {why}; {kept}") from error


class _OpenPlane:
    """The plane being written: cuts items into frames."""

    def __init__(self, shape: PlaneShape, offset: int):
        self.shape, self.offset = shape, offset
        self.encoder: Encoder = CODECS[shape.codec].encoder()
        self.table = bytearray()
        self.n_items = 0
        self._frame = np.zeros((shape.per_frame, shape.stride), np.uint8)
        self._n_waiting = 0

    def frames_of(self, items: np.ndarray) -> Iterable[np.ndarray]:
        """The frames that `items` complete; what is left waits for more."""
        per_frame = self.shape.per_frame
        self.n_items += len(items)
        if self._n_waiting:
            n = min(per_frame - self._n_waiting, len(items))
            self._frame[self._n_waiting : self._n_waiting + n] = items[:n]
            self._n_waiting += n
            items = items[n:]
            if self._n_waiting == per_frame:
                self._n_waiting = 0
                yield self._frame
        while len(items) >= per_frame:
            yield items[:per_frame]
            items = items[per_frame:]
        if len(items):
            self._frame[: len(items)] = items
            self._n_waiting = len(items)

    def last_frame(self) -> np.ndarray | None:
        """The last frame, zero-filled, if items still wait."""
        if not self._n_waiting:
            return None
        self._frame[self._n_waiting :] = 0
        self._n_waiting = 0
        return self._frame
