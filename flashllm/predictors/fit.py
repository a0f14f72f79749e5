"""Reading a .fit file (FIT.md): the header first, believing nothing, and the sections when asked.

A file is a run of bytes in one or more extents of a file, so that predictors inside a container are
read where they lie.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import FitMismatchError, FlashReadError, FormatError, UsageError
from ..kernels.base import KernelSet
from ..regular import drop_page_cache, open_regular, read_into
from ..units import align_up
from .header import ALIGNMENT, PREAMBLE, Header, parse_manifest, parse_preamble
from .kinds import FITTED
from .scores import FittedLayer, FittedPredictor, Scratch


def fit_path(model: str | os.PathLike) -> Path:
    """Where the fit of a container is looked for: `model.flash.fit` beside `model.flash`."""
    return Path(f"{os.fspath(model)}.fit")


BLOB = "predictors.fit."  # of a container, and a number from 0 (FIT.md section 5)


def is_fit_blob(name: str) -> bool:
    return name.startswith(BLOB)


def fit_extents(blobs: Mapping[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """Where a container, of blobs name -> (offset, bytes), carries a fit; [] if it has none."""
    extents = []
    while (name := f"{BLOB}{len(extents)}") in blobs:
        extents.append(blobs[name])
    return extents


def open_fit(
    path: str | os.PathLike, *, extents: Sequence[tuple[int, int]] | None = None
) -> Fit:
    """The fit at `path`, or in `extents` (offset, bytes) of that file, one after another.

    Reads preamble and manifest only.  Raises FormatError where they break the format,
    UnsupportedError for another version, FlashReadError when the file cannot be read.
    """
    source = _Source(path, extents)
    raw = source.read(0, min(source.n_bytes, PREAMBLE.size), "preamble")
    manifest_bytes, digest = parse_preamble(path, raw, file_bytes=source.n_bytes)
    end = align_up(PREAMBLE.size + manifest_bytes, ALIGNMENT)
    if end > source.n_bytes:
        raise FormatError(path, "manifest", f"room up to byte {end}", f"{source.n_bytes} bytes")
    raw = source.read(PREAMBLE.size, end - PREAMBLE.size, "manifest")
    manifest, padding = raw[:manifest_bytes], raw[manifest_bytes:]
    found = hashlib.sha256(manifest).digest()
    if found != digest:
        raise FormatError(path, "manifest", f"sha256 {digest.hex()}", found.hex())
    return Fit(source, parse_manifest(path, manifest, padding, file_bytes=source.n_bytes))


class Fit:
    """An accepted .fit file; nothing of its predictors is in memory until `load`.

    `path`, `container_digest` (of the container it was fitted to), `recalls` (ascending),
    `layers` (FittedLayer each), `resident_bytes` (what `load` will keep), `header`.
    """

    def __init__(self, source: _Source, header: Header):
        self._source, self.header = source, header
        self.path = source.path
        self.container_digest = header.model
        self.recalls, self.layers = header.recalls, header.layers

    @property
    def resident_bytes(self) -> int:
        """All predictors of the fit and their shared scratch."""
        kept = sum(FITTED[layer.kind].bytes_kept(layer) for layer in self.layers)
        return kept + Scratch.bytes_needed(list(self.layers))

    def require(self, digest: str) -> None:
        """FitMismatchError unless this was fitted to the container with that digest."""
        if digest != self.container_digest:
            raise FitMismatchError(self.path, self.container_digest, digest)

    def require_shape(self, hidden_size: int, n_bundles: dict[int, int]) -> None:
        """FormatError unless each layer here is one of the model's, {layer: n_bundles}, and has its
        bundles and hidden size: a file may claim any digest."""
        found = {layer.layer: layer.n_bundles for layer in self.layers}
        wanted = {n: n_bundles.get(n) for n in found}
        if self.header.hidden_size != hidden_size or found != wanted:
            wrong = next((n for n in found if found[n] != wanted[n]), None)
            place = "hidden_size" if wrong is None else f"layer {wrong}: n_bundles"
            expected = hidden_size if wrong is None else wanted[wrong]
            claimed = self.header.hidden_size if wrong is None else found[wrong]
            raise FormatError(self.path, place, expected, claimed)

    def place(self, recall: float) -> int:
        """Index of the least fitted recall that is at least `recall`; UsageError beyond them."""
        for i, known in enumerate(self.recalls):
            if known >= recall - 1e-9:
                return i
        most = self.recalls[-1]
        raise UsageError(f"recall {recall} was asked for; {self.path} was fitted for up to {most}")

    def load(self, kernels: KernelSet, recall: float) -> dict[int, FittedPredictor]:
        """{layer: predictor} at `recall`.  They share scratch: one works at a time.

        Raises UsageError for a recall beyond `recalls`, FormatError for a damaged section.
        """
        at = self.place(recall)
        scratch = Scratch(kernels, list(self.layers))
        return {
            layer.layer: self._load(layer, layer.thresholds[at], kernels, scratch)
            for layer in self.layers
        }

    def _load(
        self, layer: FittedLayer, threshold: float, kernels: KernelSet, scratch: Scratch
    ) -> FittedPredictor:
        kind, where = FITTED[layer.kind], f"layer {layer.layer}"
        weights = aligned(kind.weight_bytes(layer))
        rest = np.empty(layer.n_bytes - weights.size, np.uint8)
        self._source.read_into(layer.offset, weights, where)
        self._source.read_into(layer.offset + weights.size, rest, where)
        found = hashlib.sha256(weights)
        found.update(rest)
        if found.hexdigest() != layer.sha256:
            raise FormatError(self.path, where, f"sha256 {layer.sha256}", found.hexdigest())
        rest = rest[: kind.rest_bytes(layer)]
        return kind(self.path, layer, weights, rest, threshold, kernels, scratch)


def aligned(n_bytes: int) -> np.ndarray:
    """uint8 [n_bytes] at a multiple of 64, as the kernels like it."""
    raw = np.empty(n_bytes + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + n_bytes]


class _Source:
    """Bytes of extents of one regular file, opened for each read: it may be deleted meanwhile, and
    nothing has to be closed."""

    def __init__(self, path: str | os.PathLike, extents: Sequence[tuple[int, int]] | None):
        self.path = Path(path)
        fd = open_regular(self.path)
        size = os.fstat(fd).st_size
        os.close(fd)
        self._extents = list(extents) if extents is not None else [(0, size)]
        self.n_bytes = sum(n for _, n in self._extents)

    def read(self, offset: int, n_bytes: int, where: str) -> bytes:
        out = np.empty(n_bytes, np.uint8)
        self.read_into(offset, out, where)
        return out.tobytes()

    def read_into(self, offset: int, out: np.ndarray, where: str) -> None:
        """Fill uint8 `out`; the page cache of what was read is given back."""
        fd = open_regular(self.path)
        try:
            done = 0
            for start, n_bytes in self._extents:
                inside = min(max(0, offset + done), n_bytes)
                n = min(out.size - done, n_bytes - inside) if offset + done < n_bytes else 0
                if n > 0:
                    part, at = out[done : done + n], start + inside
                    read_into(fd, self.path, at, memoryview(part), where)
                    drop_page_cache(fd, at, n)
                    done += n
                offset -= n_bytes
            if done < out.size:
                why = "the file ends early"
                raise FlashReadError(errno.EIO, why, self.path, offset + done, where)
        finally:
            os.close(fd)
