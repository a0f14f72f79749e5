"""What a container holds, once it is believed: pieces, planes, vectors, blobs; and the numbers of
the format.  FORMAT.md is the contract; section numbers below are its.

`PlaneShape.problem` states every rule about one plane.  The reader turns a problem into a
FormatError, the writer into a UsageError, so that nothing can be written that would not be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..codecs import CODECS
from ..quant import WEIGHT_TYPES
from ..units import GIB, MIB, align_up

VERSION = 1
SECTION_ALIGNMENT = 16384
ALIGNMENTS = (512, 4096, 16384)
PIECE_ALIGNMENT = 16
SMALL_ALIGNMENT = 64  # of vectors and blobs inside their sections

MAX_INDEX_BYTES = 64 * MIB
MAX_MANIFEST_BYTES = MIB
MAX_COMMAS, MAX_BRACKETS, MAX_DEPTH = 100_000, 20_000, 12
MAX_FILE_BYTES = 2**60
MAX_PLANES, MAX_VECTORS, MAX_BLOBS = 16384, 65536, 64
MAX_ITEMS, MAX_COLS, MAX_PIECES = 2**31 - 1, 2**24, 8
MAX_FRAME_BYTES, MAX_ITEM_BYTES = MIB, 64 * MIB
MAX_VECTOR_LENGTH, MAX_VECTORS_BYTES = 2**28, GIB
MAX_BLOB_BYTES = 64 * MIB

NAME = re.compile(r"[a-z0-9_]+(?:\.[a-z0-9_]+)*")
FAMILY = re.compile(r"[a-z][a-z0-9_]*")
BLOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MAX_NAME, MAX_FAMILY, MAX_BLOB_NAME = 128, 32, 64

KINDS = ("rows", "bundles")

# One row of a frame table (section 4).
FRAME_ROW = np.dtype([("offset", "<u8"), ("stored", "<u4"), ("digest", "<u8")])
assert FRAME_ROW.itemsize == 20

Problem = tuple[str, object, object]  # where, expected, found


def is_name(text: object, pattern: re.Pattern, longest: int) -> bool:
    return isinstance(text, str) and len(text) <= longest and bool(pattern.fullmatch(text))


def is_count(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class Piece:
    """One row of `n_cols` values of `weight_type`, `offset` bytes into every item of a plane."""

    name: str
    weight_type: str
    n_cols: int
    offset: int = 0

    @cached_property
    def row_bytes(self) -> int:
        return WEIGHT_TYPES[self.weight_type].row_bytes(self.n_cols)


def lay_out_pieces(pieces: Iterable[tuple[str, str, int]]) -> tuple[Piece, ...]:
    """(name, weight type, columns) of an item's pieces, in order -> Pieces with their offsets."""
    placed, end = [], 0
    for name, weight_type, n_cols in pieces:
        piece = Piece(name, weight_type, n_cols, align_up(end, PIECE_ALIGNMENT))
        placed.append(piece)
        end = piece.offset + piece.row_bytes
    return tuple(placed)


@dataclass(frozen=True)
class PlaneShape:
    """A plane without its frames' places: what the manifest says of it."""

    name: str
    kind: str
    n_items: int
    per_frame: int
    codec: str
    pieces: tuple[Piece, ...]
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def stride(self) -> int:
        """Bytes from one item of a decoded frame to the next."""
        last = self.pieces[-1]
        return align_up(last.offset + last.row_bytes, PIECE_ALIGNMENT)

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of the bytes of an item that belong to no piece, and are zero."""
        starts = [0, *(piece.offset + piece.row_bytes for piece in self.pieces)]
        stops = [*(piece.offset for piece in self.pieces), self.stride]
        pairs = zip(starts, stops, strict=True)
        return tuple((start, stop) for start, stop in pairs if start < stop)

    @property
    def frame_bytes(self) -> int:
        """Bytes of every decoded frame."""
        return self.per_frame * self.stride

    @property
    def n_frames(self) -> int:
        return -(-self.n_items // self.per_frame)

    def piece(self, name: str) -> Piece:
        for piece in self.pieces:
            if piece.name == name:
                return piece
        raise KeyError(f"plane {self.name} has no piece {name!r}")

    def n_items_in(self, frame: int) -> int:
        """Items of this frame; fewer than `per_frame` in the last one only."""
        return min(self.per_frame, self.n_items - frame * self.per_frame)

    def problem(self) -> Problem | None:
        """The first broken rule of section 3, or None."""
        if not is_name(self.name, NAME, MAX_NAME):
            return "name", f"words of a-z, 0-9, _ and dots, at most {MAX_NAME}", repr(self.name)
        if self.kind not in KINDS:
            return "kind", " or ".join(KINDS), repr(self.kind)
        if self.codec not in CODECS:
            return "codec", f"one of {', '.join(CODECS)}", repr(self.codec)
        if not is_count(self.n_items, 1, MAX_ITEMS):
            return "n_items", f"1 to {MAX_ITEMS}", repr(self.n_items)
        if not is_count(self.per_frame, 1, self.n_items):
            return "per_frame", f"1 to n_items ({self.n_items})", repr(self.per_frame)
        return self._pieces_problem() or self._frame_problem() or self._parts_problem()

    def _pieces_problem(self) -> Problem | None:
        most = 1 if self.kind == "rows" else MAX_PIECES
        if not 1 <= len(self.pieces) <= most:
            return "pieces", f"1 to {most} for {self.kind}", len(self.pieces)
        if self.kind == "rows" and self.pieces[0].name != "row":
            return "pieces", "a piece named 'row'", repr(self.pieces[0].name)
        end = 0
        for i, piece in enumerate(self.pieces):
            at = f"pieces[{i}]"
            if not is_name(piece.name, NAME, MAX_NAME):
                return f"{at}.name", "a name", repr(piece.name)
            if piece.name in [other.name for other in self.pieces[:i]]:
                return f"{at}.name", "a name not used before", repr(piece.name)
            if piece.weight_type not in WEIGHT_TYPES:
                known = ", ".join(WEIGHT_TYPES)
                return f"{at}.weight_type", f"one of {known}", repr(piece.weight_type)
            if not is_count(piece.n_cols, 1, MAX_COLS):
                return f"{at}.n_cols", f"1 to {MAX_COLS}", repr(piece.n_cols)
            if piece.offset != align_up(end, PIECE_ALIGNMENT):
                return f"{at}.offset", align_up(end, PIECE_ALIGNMENT), repr(piece.offset)
            end = piece.offset + piece.row_bytes
        return None

    def _frame_problem(self) -> Problem | None:
        if self.stride > MAX_ITEM_BYTES:
            return "item", f"at most {MAX_ITEM_BYTES} bytes", f"{self.stride} bytes"
        if self.per_frame > 1 and self.frame_bytes > MAX_FRAME_BYTES:
            return "per_frame", f"frames of at most {MAX_FRAME_BYTES} bytes", self.frame_bytes
        weight_types = [piece.weight_type for piece in self.pieces]
        if not CODECS[self.codec].accepts(weight_types):
            return "codec", f"one that codes {', '.join(weight_types)}", repr(self.codec)
        return None

    def _parts_problem(self) -> Problem | None:
        end = 0
        for name, (start, stop) in self.parts.items():
            if not is_name(name, NAME, MAX_NAME):
                return "parts", "names of a-z, 0-9, _ and dots", repr(name)[:200]
            if start != end or not is_count(stop, end + 1, self.n_items):
                return f"parts[{name}]", f"a run of items that starts at {end}", (start, stop)
            end = stop
        if self.parts and end != self.n_items:
            return "parts", f"runs that cover {self.n_items} items", end
        return None


@dataclass(frozen=True, eq=False)
class Plane(PlaneShape):
    """An ordered sequence of frames in a file.

    `offsets` uint64[n_frames], `stored` uint32[n_frames] (bytes without padding), `digests`
    uint64[n_frames] (XXH64 of the stored bytes, seeded with `seed(frame)`); all read-only.
    """

    file_id: int = 0
    offsets: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    stored: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    def seed(self, frame: int) -> int:
        return frame_seed(self.file_id, int(self.offsets[frame]))

    def seeds(self) -> np.ndarray:
        """`seed` of every frame, uint64[n_frames]."""
        return self.offsets + np.uint64(self.file_id)  # wraps, as section 5 says

    @property
    def stored_bytes(self) -> int:
        """From the first frame's first byte to the last frame's last."""
        return int(self.offsets[-1]) + int(self.stored[-1]) - int(self.offsets[0])


def frame_seed(file_id: int, offset: int) -> int:
    """Seed of the checksum of what lies at `offset` (section 5)."""
    return (file_id + offset) % 2**64


@dataclass(frozen=True)
class Vector:
    """A resident float32 tensor; `offset` is relative to the vectors' section."""

    name: str
    length: int
    offset: int


@dataclass(frozen=True)
class Vectors:
    """The vectors' section."""

    offset: int = 0
    n_bytes: int = 0
    digest: int = 0
    tensors: tuple[Vector, ...] = ()


@dataclass(frozen=True)
class Blob:
    """A file carried verbatim; `offset` is that in the container."""

    name: str
    offset: int
    n_bytes: int
    sha256: str
