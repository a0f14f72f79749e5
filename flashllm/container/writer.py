"""Writing a container: front to back, frame by frame, whole or not at all.

Memory: one frame (framing.py), one batch of stored frames (partial.py), the frame tables, and the
vectors and blobs that were given (carried.py).  Nothing has the final name before everything is on
the disk; what was written before a kill is used by the next run of the same conversion
(journal.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from .._core import xxh64
from ..codecs import CODECS, Encoder
from ..durable import expect_replaceable, partial_path
from ..errors import UsageError
from ..units import align_up
from .base import (
    ALIGNMENTS,
    FAMILY,
    FRAME_ROW,
    MAX_FAMILY,
    SECTION_ALIGNMENT,
    Piece,
    PlaneShape,
    frame_seed,
    is_name,
)
from .canonical import canonical_json
from .carried import Carried
from .framing import Framer
from .header import HEADER_BYTES, Superblock
from .journal import Journal, WrittenPlane
from .manifest import Manifest
from .partial import PartialFile
from .reader import open_container

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
        self._carried = Carried()
        self._planes: list[WrittenPlane] = []
        self._resumed: list[WrittenPlane] = []  # of an earlier run, not yet asked for again
        self._open: _OpenPlane | None = None
        partial = partial_path(self.path)
        self._journal = Journal(partial.with_name(partial.name + ".journal"))
        self._file = PartialFile(self.path, on_gone=self._journal.remove)
        try:
            with self._file.reported():
                self._resume()
            self._file.check_space(estimate_bytes)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------- opening

    def _check_target(self) -> None:
        expect_replaceable(self.path)
        if not self._overwrite and os.path.lexists(self.path):
            raise UsageError(f"{self.path} exists; pass overwrite=True to replace it")

    def _resume(self) -> None:
        """Keep the planes of an earlier run that are intact, cut off the rest."""
        end = SECTION_ALIGNMENT
        for plane in self._journal.load(self._identity):
            placed = plane.offset == align_up(end, SECTION_ALIGNMENT)
            if not placed or not plane.is_intact(
                self._file.fileno(), self._file.path, self.file_id
            ):
                break
            self._resumed.append(plane)
            end = plane.end
        self._journal.start(self._identity, self._resumed)
        self._file.cut(end)
        self._file.overwrite(0, bytes(HEADER_BYTES))  # of a run that was killed in its commit

    # -------------------------------------------------------------------------------- planes

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
        self._open = _OpenPlane(shape, align_up(self._file.end, SECTION_ALIGNMENT))
        return True

    def _forget_resumed(self) -> None:
        """The conversion took another turn than the interrupted one: cut off what differs."""
        self._resumed = []
        self._file.cut(self._planes[-1].end if self._planes else SECTION_ALIGNMENT)
        with self._file.reported():
            self._journal.start(self._identity, self._planes)

    def write_items(self, items: np.ndarray) -> None:
        """Append `items` uint8[k, stride] to the open plane; any k; zeros between pieces."""
        self._check_open()
        plane = self._open
        if plane is None:
            raise UsageError("write_items without a plane that was begun")
        for frame in plane.framer.frames_of(items):
            self._write_frame(plane, frame)

    def end_plane(self) -> None:
        """Finish the open plane; UsageError if items are missing."""
        self._check_open()
        plane = self._open
        if plane is None:
            raise UsageError("end_plane without a plane that was begun")
        last = plane.framer.last_frame()
        if last is not None:
            self._write_frame(plane, last)
        self._file.flush()
        written = WrittenPlane(plane.shape, plane.offset, bytes(plane.table))
        with self._file.reported():
            self._journal.note(written)
        self._planes.append(written)
        self._open = None

    def _write_frame(self, plane: _OpenPlane, frame: np.ndarray) -> None:
        stored = plane.encoder.encode(memoryview(frame).cast("B"))
        at = SECTION_ALIGNMENT if not plane.table else self.alignment
        offset = align_up(self._file.end, at)
        self._file.put(offset, stored)
        digest = xxh64(stored, frame_seed(self.file_id, offset))
        plane.table += _FRAME.pack(offset, len(stored), digest)

    # ------------------------------------------------------------------------- vectors, blobs

    def add_vectors(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Carry finite 1-D tensors as float32 (kept in memory until `commit`)."""
        self._check_open()
        for name, values in vectors.items():
            self._carried.add_vector(name, values)

    def add_blob(self, name: str, data: bytes) -> None:
        """Carry a file verbatim (kept in memory until `commit`)."""
        self._check_open()
        self._carried.add_blob(name, data)

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
        vectors, blobs = self._carried.write(self._file, self.file_id)
        planes = tuple((plane.shape, plane.offset) for plane in self._planes)
        manifest = Manifest(self.family, self.config, self.meta, planes, vectors, blobs).encode()
        sha256 = hashlib.sha256(manifest)
        offset = align_up(self._file.end, SECTION_ALIGNMENT)
        self._file.put(offset, manifest)
        for plane in self._planes:
            sha256.update(plane.table)
            self._file.put(self._file.end, plane.table)
        self._file.flush()
        superblock = Superblock(
            file_id=self.file_id,
            file_bytes=self._file.end,
            alignment=self.alignment,
            index_offset=offset,
            index_bytes=self._file.end - offset,
            manifest_bytes=len(manifest),
            index_sha256=sha256.digest(),
        )
        self._file.overwrite(0, superblock.pack())
        self._file.sync(os.fsync)
        open_container(self._file.path).close()  # no file is named that would not open
        self._check_target()
        self._file.rename()
        return superblock.index_sha256.hex()

    def close(self) -> None:
        """Stop here; what is finished stays for the next run.  Doing so again is nothing."""
        self._journal.close()
        self._file.close()

    def __enter__(self) -> ContainerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._file.is_open:
            raise UsageError(f"{self.path}: this writer is closed")


class _OpenPlane:
    """The plane being written."""

    def __init__(self, shape: PlaneShape, offset: int):
        self.shape, self.offset = shape, offset
        self.framer = Framer(shape)
        self.encoder: Encoder = CODECS[shape.codec].encoder()
        self.table = bytearray()
