"""Writing a .fit file: sections as they are fitted, the header last, and then the name.

The manifest's length is not known before the last section, so sections wait in a second temporary
file; both lie beside the target and neither survives an error.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

from ..container.files import sync_directory
from ..errors import UsageError
from ..predictors.header import ALIGNMENT, Header, section_bytes
from ..predictors.scores import FittedLayer
from ..units import align_up


class FitWriter:
    """`add` sections in ascending order of layer, then `commit`; leaving the `with` without it
    leaves nothing behind."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._sections = self.path.with_name(self.path.name + ".sections")
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._layers: list[FittedLayer] = []
        self._file = open(self._sections, "w+b")  # noqa: SIM115 (closed by close)

    def add(self, layer: FittedLayer, section: bytes) -> None:
        """A layer without offset, bytes and digest, and the bytes that its form asks for."""
        wanted = section_bytes(layer)
        if align_up(len(section), ALIGNMENT) != wanted:
            raise UsageError(f"a section of {len(section)} bytes for a form of {wanted}")
        padded = section.ljust(wanted, b"\0")
        digest = hashlib.sha256(padded).hexdigest()
        self._layers.append(replace(layer, n_bytes=wanted, sha256=digest))
        self._file.write(padded)

    def commit(self, header: Header) -> Header:
        """Write `header`, whose layers may differ from those added in what was measured, and the
        sections; give the file its name.  Returns the header as written."""
        if [x.layer for x in header.layers] != [x.layer for x in self._layers]:
            raise UsageError("the header has other layers than were added")
        header = replace(header, layers=self._placed(header))
        with open(self._partial, "wb") as out:
            out.write(header.encode())
            self._file.seek(0)
            shutil.copyfileobj(self._file, out, 2**20)
            out.flush()
            os.fsync(out.fileno())
        os.replace(self._partial, self.path)
        self.close(done=True)
        sync_directory(self.path.parent)
        return header

    def _placed(self, header: Header) -> tuple[FittedLayer, ...]:
        """Layers with their offsets: these are digits in the manifest, whose length they move."""
        head = 0
        while True:
            layers, end = [], head
            for said, added in zip(header.layers, self._layers, strict=True):
                layers.append(
                    replace(said, offset=end, n_bytes=added.n_bytes, sha256=added.sha256)
                )
                end += added.n_bytes
            needed = replace(header, layers=tuple(layers)).head_bytes()
            if needed <= head:
                return tuple(layers)
            head = needed

    def close(self, *, done: bool = False) -> None:
        """Without `commit` before it: nothing is left."""
        if not self._file.closed:
            self._file.close()
            self._sections.unlink(missing_ok=True)
            if not done:
                self._partial.unlink(missing_ok=True)

    def __enter__(self) -> FitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

