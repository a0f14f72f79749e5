"""A container as a checkpoint: what was converted can be converted again (inflated, requantised).

Frames are read one at a time, verified and decoded; quantised weights come out as float32.  A
tensor is found by the name that its role prefers, whatever it was called in the first source.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import numpy as np

from .._core import xxh64
from ..checkpoints import STORAGE_DTYPES, Checkpoint
from ..codecs import CODECS
from ..container import Container, open_container
from ..container.base import Piece, Plane
from ..errors import ChecksumError
from ..models.base import bundling
from ..models.configs import config_from_dict
from ..models.shapes import check_shapes
from ..predictors.fit import is_fit_blob
from ..quant import WEIGHT_TYPES
from ..regular import drop_page_cache, read_exactly

BLOCK_BYTES = 8 * 2**20  # of decoded bundles
RUN_BYTES = 2**20  # of neighbouring frames read at once: frames may be of one neuron


class PlaneReader:
    """Decoded items of one plane, the last frame being kept, and frames that were read with it."""

    def __init__(self, plane: Plane, container: Container):
        self.plane, self._container = plane, container
        self._decoder = CODECS[plane.codec].decoder()
        self._frame = np.empty((plane.per_frame, plane.stride), np.uint8)
        self._held = -1
        self._run, self._in_run = memoryview(b""), range(0)  # bytes as stored, of these frames

    def _load(self, frame: int, last: int) -> np.ndarray:
        """Items of a frame; those up to `last` will be asked for next."""
        if frame != self._held:
            plane = self.plane
            stored = self._stored(frame, last)
            found, expected = xxh64(stored, plane.seed(frame)), int(plane.digests[frame])
            if found != expected:
                where = f"plane {plane.name}, frame {frame}"
                raise ChecksumError(self._container.path, where, expected, found)
            self._held = -1
            self._decoder.decode_into(stored, memoryview(self._frame).cast("B"))
            self._held = frame
        return self._frame

    def _stored(self, frame: int, last: int) -> memoryview:
        """The bytes of a frame, with as many of the frames up to `last` as make a good read."""
        plane, fd, path = self.plane, self._container.fileno(), self._container.path
        if frame not in self._in_run:
            first = int(plane.offsets[frame])
            wanted = slice(frame, last + 1)
            ends = plane.offsets[wanted].astype(np.int64) + plane.stored[wanted] - first
            n = max(1, int(np.searchsorted(ends, RUN_BYTES, side="right")))
            n_bytes = int(ends[n - 1])
            where = f"plane {plane.name}, frame {frame}" + (f" to {frame + n - 1}" if n > 1 else "")
            self._in_run = range(0)
            self._run = memoryview(read_exactly(fd, path, first, n_bytes, where))
            self._in_run = range(frame, frame + n)
            drop_page_cache(fd, first, n_bytes)
        at = int(plane.offsets[frame]) - int(plane.offsets[self._in_run.start])
        return self._run[at : at + int(plane.stored[frame])]

    def items(self, piece: Piece, start: int, stop: int) -> np.ndarray:
        """One piece of items: uint8 [stop - start, piece.row_bytes]."""
        return self._columns(start, stop, piece.offset, piece.offset + piece.row_bytes)

    def whole(self, start: int, stop: int) -> np.ndarray:
        """Items with all their pieces: uint8 [stop - start, stride]."""
        return self._columns(start, stop, 0, self.plane.stride)

    def _columns(self, start: int, stop: int, first_byte: int, end_byte: int) -> np.ndarray:
        out = np.empty((stop - start, end_byte - first_byte), np.uint8)
        per_frame, at, last = self.plane.per_frame, start, (stop - 1) // self.plane.per_frame
        while at < stop:
            frame, first = divmod(at, per_frame)
            n = min(per_frame - first, stop - at)
            rows = self._load(frame, last)[first : first + n]
            out[at - start : at - start + n] = rows[:, first_byte:end_byte]
            at += n
        return out


class ContainerCheckpoint(Checkpoint):
    """See Checkpoint.  `normalised` carries the family and config that the container states."""

    kind: ClassVar[str] = "container"

    def __init__(self, path: str | os.PathLike):
        super().__init__(Path(path))
        self._container = open_container(path)
        with self.closed_on_error():
            self._open()

    def _open(self) -> None:
        container = self._container
        self.normalised = (container.family, container.config)
        config = config_from_dict(container.family, container.config, path=self.path)
        check_shapes(config, container.planes, container.vectors, self.path)
        readers = {name: PlaneReader(plane, container) for name, plane in container.planes.items()}
        vectors = container.load_vectors()
        # name -> (reader, piece, first item, shape, transposed), or -> values
        self._planes: dict[str, tuple[PlaneReader, Piece, int, tuple[int, ...], bool]] = {}
        self._vectors: dict[str, np.ndarray] = {}
        roles = config.roles()
        if bundle := bundling(container.planes):
            roles = roles.arranged(bundle)
        for role in roles.planes:
            reader, start = readers[role.name], 0
            for group in role.groups():
                for name, tensor in group:
                    piece = reader.plane.piece(name if role.kind == "bundles" else "row")
                    place = (reader, piece, start, tensor.shape, tensor.transposed)
                    self._planes[tensor.names[0]] = place
                start += group[0][1].n_items
        for vector in roles.vectors:
            values, start = vectors[vector.name], 0
            for part in vector.parts:
                self._vectors[part.names[0]] = values[start : start + part.shape[0]]
                start += part.shape[0]

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        names = [name for name in self._container.blobs if not is_fit_blob(name)]
        return {name: self._container.read_blob(name) for name in names}

    def names(self) -> list[str]:
        return [*self._planes, *self._vectors]

    def __contains__(self, name: object) -> bool:
        return name in self._planes or name in self._vectors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._planes[name][3] if name in self._planes else self._vectors[name].shape

    def dtype(self, name: str) -> str:
        if name in self._vectors:
            return "f32"
        weight_type = self._planes[name][1].weight_type
        return weight_type if weight_type in STORAGE_DTYPES else "f32"

    def _items(self, name: str, start: int, stop: int) -> np.ndarray:
        self.check_open()
        reader, piece, first, _, _ = self._planes[name]
        raw = reader.items(piece, first + start, first + stop)
        if piece.weight_type in STORAGE_DTYPES:
            return raw.view(STORAGE_DTYPES[piece.weight_type])
        return WEIGHT_TYPES[piece.weight_type].decode(raw, piece.n_cols)

    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if name in self._vectors:
            return self._vectors[name][start:stop]
        _, piece, _, shape, transposed = self._planes[name]
        if not transposed:
            return self._items(name, start, stop)
        # every bundle for a few rows, and again for the next: slow, and a block is all it holds
        step, rows = max(1, BLOCK_BYTES // (4 * piece.n_cols)), None
        for first in range(0, shape[1], step):
            items = self._items(name, first, min(first + step, shape[1]))
            if rows is None:
                rows = np.empty((stop - start, shape[1]), items.dtype)
            rows[:, first : first + step] = items[:, start:stop].T
        return rows

    def columns(self, name: str, start: int, stop: int) -> np.ndarray | None:
        return self._items(name, start, stop) if self._planes[name][4] else None

    @property
    def fingerprint(self) -> str:
        return self._container.digest

    @property
    def files(self) -> list[Path]:
        return [self.path]

    @property
    def n_bytes(self) -> int:
        return self._container.size

    def close(self) -> None:
        super().close()
        self._container.close()
