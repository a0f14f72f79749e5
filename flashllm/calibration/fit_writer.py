"""Writing a .fit file: sections as they are fitted, the header last, and then the name.

The manifest's length is not known before the last section, so sections wait in a second temporary
file; both lie beside the target and neither survives an error.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from ..durable import WholeFile
from ..errors import UsageError
from ..predictors.header import ALIGNMENT, Header, section_bytes
from ..predictors.scores import FittedLayer
from ..units import align_up


class FitWriter:
    """`add` sections, then `commit` those that were chosen; leaving the `with` without it leaves
    nothing behind."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._sections = self.path.with_name(self.path.name + ".sections")
        self._at: list[tuple[int, int, str]] = []  # offset, bytes, digest
        self._file = open(self._sections, "w+b")  # noqa: SIM115 (closed by close)

    def add(self, layer: FittedLayer, section: bytes) -> int:
        """The bytes that the form of `layer` asks for; returns the number to commit them by."""
        wanted = section_bytes(layer)
        if align_up(len(section), ALIGNMENT) != wanted:
            raise UsageError(f"a section of {len(section)} bytes for a form of {wanted}")
        padded = section.ljust(wanted, b"\0")
        self._at.append((self._file.tell(), wanted, hashlib.sha256(padded).hexdigest()))
        self._file.write(padded)
        return len(self._at) - 1

    def commit(self, header: Header, numbers: list[int]) -> Header:
        """Write `header`, whose layers are those added by `numbers`, and their sections; give the
        file its name.  Returns the header as written."""
        header = replace(header, layers=self._placed(header, numbers))
        with WholeFile(self.path) as out:
            out.file.write(header.encode())
            for number in numbers:
                offset, n_bytes, _ = self._at[number]
                self._file.seek(offset)
                out.file.write(self._file.read(n_bytes))
            out.commit()
        self.close()
        return header

    def _placed(self, header: Header, numbers: list[int]) -> tuple[FittedLayer, ...]:
        """Layers with their offsets: these are digits in the manifest, whose length they move."""
        head = 0
        while True:
            layers, end = [], head
            for said, number in zip(header.layers, numbers, strict=True):
                _, n_bytes, digest = self._at[number]
                layers.append(replace(said, offset=end, n_bytes=n_bytes, sha256=digest))
                end += n_bytes
            needed = replace(header, layers=tuple(layers)).head_bytes()
            if needed <= head:
                return tuple(layers)
            head = needed

    def close(self) -> None:
        """Without `commit` before it: nothing is left."""
        if not self._file.closed:
            self._file.close()
            self._sections.unlink(missing_ok=True)

    def __enter__(self) -> FitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

