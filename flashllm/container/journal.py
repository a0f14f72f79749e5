"""The journal of an unfinished conversion: one line per finished plane.

A line is the XXH64 of its text, a space, and canonical JSON, so that a torn last line is noticed
and ends the journal.  The first line says which conversion this is; a plane's line carries its
manifest entry and its frame table.  Finished planes are not synced one by one: after a power cut
the journal may know more than the disk, and so a plane counts only if all its frames still match
their digests.
"""

from __future__ import annotations

import base64
import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .._core import xxh64
from ..errors import FlashReadError, FormatError
from ..regular import drop_page_cache, open_regular, read_exactly
from ..units import align_up
from .base import FRAME_ROW, SECTION_ALIGNMENT, PlaneShape, frame_seed
from .canonical import canonical_json
from .manifest import parse_plane, plane_to_json


@dataclass(frozen=True)
class WrittenPlane:
    """A plane whose frames are in the partial file; `table` holds packed FRAME_ROWs."""

    shape: PlaneShape
    offset: int
    table: bytes

    @property
    def rows(self) -> np.ndarray:
        return np.frombuffer(self.table, FRAME_ROW)

    @property
    def end(self) -> int:
        last = self.rows[-1]
        return int(last["offset"]) + int(last["stored"])

    def is_intact(self, fd: int, path: object, file_id: int) -> bool:
        """Whether every frame in the file still has its digest."""
        try:
            for offset, stored, digest in self.rows.tolist():
                raw = read_exactly(fd, path, offset, stored, "frame")
                if xxh64(raw, frame_seed(file_id, offset)) != digest:
                    return False
        except FlashReadError:  # shorter than the journal says
            return False
        finally:
            drop_page_cache(fd, self.offset, self.end - self.offset)
        return True


class Journal:
    """The journal file beside a partial container."""

    def __init__(self, path: Path):
        self.path = path
        self._fd: int | None = None

    def load(self, identity: dict) -> list[WrittenPlane]:
        """Planes noted by an earlier run of the conversion `identity`; none by any other."""
        planes: list[WrittenPlane] = []
        try:
            with os.fdopen(open_regular(self.path), "rb") as file:
                if _parse_line(file.readline()) != identity:
                    return []
                for line in file:
                    plane = self._parse_plane(_parse_line(line), identity)
                    if plane is None:
                        break
                    planes.append(plane)
        except FlashReadError as error:
            if error.errno != errno.ENOENT:
                raise
        return planes

    def _parse_plane(self, entry: object, identity: dict) -> WrittenPlane | None:
        if not isinstance(entry, dict) or set(entry) != {"plane", "table"}:
            return None
        try:
            shape, offset = parse_plane(self.path, "plane", entry["plane"])
            table = base64.b64decode(entry["table"], validate=True)
        except (FormatError, ValueError, TypeError):
            return None
        if len(table) != shape.n_frames * FRAME_ROW.itemsize or offset % SECTION_ALIGNMENT:
            return None
        rows = np.frombuffer(table, FRAME_ROW).tolist()
        end = offset
        for at, stored, _ in rows:
            if at != align_up(end, identity["alignment"]) or not 1 <= stored <= shape.frame_bytes:
                return None
            end = at + stored
        return WrittenPlane(shape, offset, table)

    def start(self, identity: dict, planes: list[WrittenPlane]) -> None:
        """Begin the file anew with what is known so far, replacing the old one at once."""
        new = self.path.with_name(self.path.name + ".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(new, flags, 0o600)
        self._append(identity)
        for plane in planes:
            self.note(plane)
        os.replace(new, self.path)

    def note(self, plane: WrittenPlane) -> None:
        """Write down that `plane` is finished."""
        entry = plane_to_json(plane.shape, plane.offset)
        self._append({"plane": entry, "table": base64.b64encode(plane.table).decode("ascii")})

    def _append(self, entry: dict) -> None:
        text = canonical_json(entry)
        line = memoryview(b"%016x %s\n" % (xxh64(text), text))
        while line:
            line = line[os.write(self._fd, line) :]

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)
        self.path.with_name(self.path.name + ".new").unlink(missing_ok=True)


def _parse_line(line: bytes) -> object | None:
    """The entry of a whole and undamaged line, else None."""
    seal, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or seal != b"%016x" % xxh64(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # sealed, and not by us
        return None
