"""Full verification: every byte of a container read once, in order, and held against its check.

What cannot even be opened raises, as `open_container` does; damage behind the index is collected,
block by block, so that a user learns what is lost and not only that something is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .._core import xxh64
from ..codecs import CODECS
from ..errors import CodecError, FlashReadError
from ..regular import drop_page_cache, read_exactly
from ..units import MIB
from .base import Plane, frame_seed
from .header import HEADER_BYTES
from .reader import Container, open_container

MAX_LISTED = 1000


@dataclass(frozen=True)
class Damage:
    """One block that is not what was written."""

    where: str
    offset: int
    n_bytes: int
    what: str

    def __str__(self) -> str:
        end = self.offset + self.n_bytes
        return f"{self.where} (bytes {self.offset} to {end}): {self.what}"


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify`.

    `sha256` of the whole file as read, None when a part could not be read; `damage` lists the first
    1000 of `n_damaged` blocks.
    """

    path: str
    size: int
    digest: str
    sha256: str | None
    n_frames: int
    n_damaged: int
    damage: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        return self.n_damaged == 0


Progress = Callable[[int, int], None]  # bytes done, bytes in all


def verify(path: str | os.PathLike, progress: Progress | None = None) -> Verification:
    """Read and check all of `path`: digests, decoded sizes, zero filling, zero padding.

    `progress(done, total)` is called as the file is read.  Raises as open_container does when the
    superblock or the index is damaged.
    """
    with open_container(path) as container:
        reading = _Pass(container, progress)
        for where, offset, n_bytes, check in _blocks(container):
            reading.pad_to(offset)
            reading.take(where, n_bytes, check)
        return reading.finish()


Check = Callable[[bytes], str | None]  # what is wrong with these bytes


def _blocks(container: Container) -> Iterator[tuple[str, int, int, Check]]:
    """(where, offset, length, check) of everything but padding, in file order."""
    superblock, section = container.superblock, container.vectors_section
    yield "superblock", 0, HEADER_BYTES, _equal(superblock.pack())
    for plane in container.planes.values():
        check_items = _item_check(plane)
        columns = (plane.offsets.tolist(), plane.stored.tolist(), plane.digests.tolist())
        for frame, (offset, stored, digest) in enumerate(zip(*columns, strict=True)):
            check = _xxh64_check(plane.seed(frame), digest, check_items(frame))
            yield f"plane {plane.name} frame {frame}", offset, stored, check
    if section.n_bytes:
        seed = frame_seed(container.file_id, section.offset)
        yield "vectors", section.offset, section.n_bytes, _xxh64_check(seed, section.digest, _fine)
    for blob in container.blobs.values():
        yield f"blob {blob.name}", blob.offset, blob.n_bytes, _sha256_check(blob.sha256)
    index_sha256 = superblock.index_sha256.hex()
    yield "index", superblock.index_offset, superblock.index_bytes, _sha256_check(index_sha256)


def _fine(_: bytes) -> None:
    return None


def _equal(expected: bytes) -> Check:
    return lambda raw: None if raw == expected else "differs from what was opened"


def _sha256_check(expected: str) -> Check:
    def check(raw: bytes) -> str | None:
        found = hashlib.sha256(raw).hexdigest()
        return None if found == expected else f"sha256 {found}, expected {expected}"

    return check


def _xxh64_check(seed: int, expected: int, then: Check) -> Check:
    def check(raw: bytes) -> str | None:
        found = xxh64(raw, seed)
        if found != expected:
            return f"checksum {found:016x}, expected {expected:016x}"
        return then(raw)

    return check


def _item_check(plane: Plane) -> Callable[[int], Check]:
    """Frames must decode, with zeros between pieces and behind the last item."""
    decoder = CODECS[plane.codec].decoder()
    items = np.empty((plane.per_frame, plane.stride), np.uint8)
    out = memoryview(items).cast("B")

    def check(raw: bytes, n_items: int) -> str | None:
        try:
            decoder.decode_into(raw, out)
        except CodecError as error:
            return f"does not decode: {error.where}: expected {error.expected}, found {error.found}"
        if items[n_items:].any():
            return "is not zero behind its last item"
        if any(items[:, start:stop].any() for start, stop in plane.gaps):
            return "is not zero between pieces"
        return None

    return lambda frame: lambda raw: check(raw, plane.n_items_in(frame))


class _Pass:
    """One sequential reading of the file, hashed as a whole on the way."""

    def __init__(self, container: Container, progress: Progress | None):
        self._container, self._progress = container, progress
        self._sha256 = hashlib.sha256()
        self._at = self._dropped = 0
        self._all_read = True
        self._n_frames = self._n_damaged = 0
        self._damage: list[Damage] = []

    def pad_to(self, offset: int) -> None:
        if offset > self._at:
            self.take("padding", offset - self._at, _zero)

    def take(self, where: str, n_bytes: int, check: Check) -> None:
        container, offset = self._container, self._at
        self._at += n_bytes
        self._n_frames += " frame " in where
        try:
            raw = read_exactly(container.fileno(), container.path, offset, n_bytes, where)
        except FlashReadError as error:
            self._all_read = False
            what = f"cannot be read: {error.strerror}"
        else:
            self._sha256.update(raw)
            what = check(raw)
        if what:
            self._n_damaged += 1
            if len(self._damage) < MAX_LISTED:
                self._damage.append(Damage(where, offset, n_bytes, what))
        if self._at - self._dropped >= MIB:
            drop_page_cache(container.fileno(), self._dropped, self._at - self._dropped)
            self._dropped = self._at
            if self._progress:
                self._progress(self._at, container.size)

    def finish(self) -> Verification:
        container = self._container
        drop_page_cache(container.fileno(), self._dropped, self._at - self._dropped)
        if self._progress:
            self._progress(self._at, container.size)
        return Verification(
            path=str(container.path),
            size=container.size,
            digest=container.digest,
            sha256=self._sha256.hexdigest() if self._all_read else None,
            n_frames=self._n_frames,
            n_damaged=self._n_damaged,
            damage=tuple(self._damage),
        )


def _zero(raw: bytes) -> str | None:
    return None if raw.count(0) == len(raw) else "padding is not zero"
