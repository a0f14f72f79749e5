"""Columns of a matrix that a file keeps by rows, in bounded memory and two passes of reading.

A neuron's down piece is a column of a [hidden, intermediate] matrix.  Small matrices are transposed
in memory.  Larger ones go through a scratch file: stripes of rows are transposed one at a time and
written side by side, and a block of columns is then one contiguous read per stripe.  The
alternatives were measured or counted out: reading the whole matrix once per block of neurons costs
22 passes for a 470 MB matrix in 60 MiB, and reading a few columns of every row is one small read,
about 65 us, for each row and block.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from ..checkpoints import STORAGE_DTYPES, Checkpoint
from ..errors import ConversionError
from ..regular import drop_page_cache

STRIPE_BYTES = 8 * 2**20


class Columns:
    """`read(start, stop)`: columns of tensor `name` as [stop - start, n_rows], storage dtype.

    Up to `memory_bytes` are kept; beyond that a scratch file in `folder`, without a name from the
    moment it exists, of the matrix's size.  Two stripes are in memory at a time.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, *, memory_bytes: int, folder: Path):
        self._checkpoint, self._name, self._folder = checkpoint, name, folder
        self._n_rows, self._n_cols = checkpoint.shape(name)
        self._dtype = STORAGE_DTYPES[checkpoint.dtype(name)]
        self._direct = checkpoint.columns(name, 0, 0) is not None
        self._whole: np.ndarray | None = None
        self._scratch = None
        self._stripes: list[tuple[int, int]] = []
        if self._direct:
            return
        if self._n_rows * self._n_cols * self._dtype.itemsize <= memory_bytes:
            self._whole = np.empty((self._n_cols, self._n_rows), self._dtype)
        else:
            self._scratch = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    def _fill(self) -> None:
        rows_at_once = max(1, STRIPE_BYTES // (self._n_cols * self._dtype.itemsize))
        for start in range(0, self._n_rows, rows_at_once):
            stop = min(start + rows_at_once, self._n_rows)
            rows = self._checkpoint.stored_rows(self._name, start, stop)
            if self._whole is not None:
                self._whole[:, start:stop] = rows.T
                continue
            self._stripes.append((start, stop))
            self._write(np.ascontiguousarray(rows.T))

    def _write(self, stripe: np.ndarray) -> None:
        data = memoryview(stripe).cast("B")
        file = self._scratch
        start = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
            getattr(os, "fdatasync", os.fsync)(file.fileno())
        except OSError as problem:
            raise ConversionError(
                f"{self._folder}: scratch file of {self._name}: {problem.strerror}"
            ) from problem
        self._drop(start, file.tell() - start)

    def _drop(self, offset: int, n_bytes: int) -> None:
        first = max(0, offset - STRIPE_BYTES) & ~4095  # as SourceFile does, and why
        drop_page_cache(self._scratch.fileno(), first, offset + n_bytes - first)

    def read(self, start: int, stop: int) -> np.ndarray:
        if self._direct:
            return self._checkpoint.columns(self._name, start, stop)
        if self._whole is not None:
            return self._whole[start:stop]
        columns = np.empty((stop - start, self._n_rows), self._dtype)
        for first, last in self._stripes:
            width = last - first
            part = np.empty((stop - start, width), self._dtype)
            offset = (first * self._n_cols + start * width) * self._dtype.itemsize
            self._read_exactly(offset, memoryview(part).cast("B"))
            columns[:, first:last] = part
        return columns

    def _read_exactly(self, offset: int, buffer: memoryview) -> None:
        self._scratch.seek(offset)
        done = 0
        while done < len(buffer):
            n_read = self._scratch.readinto(buffer[done:])
            if not n_read:
                raise ConversionError(f"{self._folder}: scratch file of {self._name} is cut short")
            done += n_read
        self._drop(offset, len(buffer))

    def close(self) -> None:
        self._whole = None
        if self._scratch is not None:
            self._scratch.close()
