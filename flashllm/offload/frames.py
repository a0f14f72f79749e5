"""Frames as places in the file, and batches of reads that bring them.

`FrameSource` is one plane as the reading side sees it.  `linear_batch` turns extents into what the
storage room submits: where each byte goes and what is checked when it is there.  Arrays in, arrays
out; nothing here waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._core import FrameTables
from ..container.base import Plane
from ..units import align_up
from .planner import Extents

RAW = "raw"
MAX_PIECES = 512  # frames of one extent; with a gap after each, a read scatters over 1024 pieces


class FrameSource:
    """Where a plane's frames lie in the file, and how long they are there and decoded."""

    def __init__(self, plane: Plane, alignment: int):
        self.plane, self.name = plane, plane.name
        self.coded = plane.codec != RAW
        self.n_frames, self.per_frame = plane.n_frames, plane.per_frame
        self.n_items, self.frame_bytes = plane.n_items, plane.frame_bytes
        self.alignment = alignment
        self.file_id = np.uint64(plane.file_id)
        self.slot_bytes = slot_bytes(plane, alignment)
        self.tables = FrameTables(
            plane.offsets, plane.stored, plane.digests, file_id=plane.file_id, alignment=alignment
        )
        self._file_bytes: int | None = None  # when asked for

    def bundles_in(self, n_bytes: int) -> int:
        """How many bundles so many bytes of the plane's file hold; 0 for a plane of rows."""
        if self.plane.kind != "bundles":
            return 0
        if self._file_bytes is None:
            self._file_bytes = int(self.places(slice(None))[1].sum())
        return round(n_bytes * self.n_items / self._file_bytes)

    def places(self, frames: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """(file offsets, lengths with padding), int64, of these frames."""
        lengths = self.plane.stored[frames].astype(np.int64)
        lengths += self.alignment - 1
        lengths -= lengths % self.alignment
        return self.plane.offsets[frames].astype(np.int64), lengths

    def extents(
        self, frames: np.ndarray, *, max_gap: int, max_extent: int, max_frames: int = MAX_PIECES
    ) -> Extents:
        """planner.coalesce of these frames, int32 ascending, at their places."""
        m = len(frames)
        first, places = np.empty(m + 1, dtype=np.int32), np.empty((2, m), dtype=np.int64)
        offset, length = places
        n = self.tables.coalesce(frames, max_gap, max_extent, max_frames, first, offset, length)
        return Extents(frames, first[: n + 1], offset[:n], length[:n])

    def describe(self, frame: int) -> str:
        """'plane layers.3.ffn, frame 17 (items 34 to 35)' for error messages."""
        start = frame * self.per_frame
        stop = min(start + self.per_frame, self.n_items)
        items = f"item {start}" if stop - start == 1 else f"items {start} to {stop - 1}"
        return f"plane {self.name}, frame {frame} ({items})"


def slot_bytes(plane: Plane, alignment: int) -> int:
    """Room for one decoded frame: reads of raw frames end at the file's alignment."""
    return align_up(plane.frame_bytes, alignment if plane.codec == RAW else 64)


def spaced(address: int, step: int, n: int) -> np.ndarray:
    """uint64[n]: `address`, `address + step`, …"""
    return np.uint64(address) + np.arange(n, dtype=np.uint64) * np.uint64(step)


@dataclass(slots=True, eq=False)
class Batch:
    """A batch as the storage contract describes it (see storage.base.ReadBatch)."""

    offset: np.ndarray
    length: np.ndarray
    iov_start: np.ndarray
    iov_address: np.ndarray
    iov_length: np.ndarray
    check_start: np.ndarray
    check_address: np.ndarray
    check_length: np.ndarray
    check_seed: np.ndarray
    check_digest: np.ndarray

    def __len__(self) -> int:
        return len(self.offset)

    def arrays(self) -> tuple[np.ndarray, ...]:
        return (
            self.offset, self.length, self.iov_start, self.iov_address, self.iov_length,
            self.check_start, self.check_address, self.check_length, self.check_seed,
            self.check_digest,
        )  # fmt: skip


def linear_places(extents: Extents, source: FrameSource, address: int) -> np.ndarray:
    """uint64 addresses of the frames when the extents lie one after the other from `address`."""
    starts = np.cumsum(extents.length) - extents.length
    offsets = source.plane.offsets[extents.frames].astype(np.int64)
    shift = np.repeat(starts - extents.offset, np.diff(extents.first))
    return (offsets + shift + address).astype(np.uint64)


def linear_batch(extents: Extents, source: FrameSource, address: int) -> tuple[Batch, np.ndarray]:
    """Each extent in one piece, one after the other; returns the batch and the frames' places."""
    places = linear_places(extents, source, address)
    starts = np.cumsum(extents.length) - extents.length
    return Batch(
        extents.offset,
        extents.length,
        np.arange(len(extents) + 1, dtype=np.int32),
        (starts + address).astype(np.uint64),
        extents.length,
        *_checks(extents, source, places),
    ), places


def _checks(extents: Extents, source: FrameSource, places: np.ndarray) -> tuple[np.ndarray, ...]:
    plane, frames = source.plane, extents.frames
    if len(extents) == 1 and len(frames) == int(frames[-1]) - int(frames[0]) + 1:
        frames = slice(int(frames[0]), int(frames[-1]) + 1)  # views instead of copies
    return (
        extents.first,
        places,
        plane.stored[frames].astype(np.int64),
        plane.offsets[frames] + source.file_id,  # wraps modulo 2**64, as the format says
        plane.digests[frames],
    )
