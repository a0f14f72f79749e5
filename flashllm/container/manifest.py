"""The manifest (FORMAT.md sections 3, 6, 7): canonical JSON <-> checked, frozen objects.

`parse_manifest` is where the manifest is distrusted: exact keys, every number in its range.
Offsets are only known to be numbers here; index.py holds them against the layout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import FormatError
from .base import (
    BLOB_NAME,
    FAMILY,
    MAX_BLOB_BYTES,
    MAX_BLOB_NAME,
    MAX_BLOBS,
    MAX_FAMILY,
    MAX_FILE_BYTES,
    MAX_ITEM_BYTES,
    MAX_NAME,
    MAX_PIECES,
    MAX_PLANES,
    MAX_VECTOR_LENGTH,
    MAX_VECTORS,
    MAX_VECTORS_BYTES,
    NAME,
    Blob,
    Piece,
    PlaneShape,
    Vector,
    Vectors,
    is_count,
    is_name,
)
from .canonical import canonical_json, parse_json, shown

_HEX16 = re.compile(r"[0-9a-f]{16}")
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What the manifest says; `planes` are shapes with the offsets of their sections."""

    family: str
    config: dict
    meta: dict
    planes: tuple[tuple[PlaneShape, int], ...]
    vectors: Vectors
    blobs: tuple[Blob, ...]

    def encode(self) -> bytes:
        return canonical_json(
            {
                "family": self.family,
                "config": self.config,
                "meta": self.meta,
                "planes": [plane_to_json(shape, offset) for shape, offset in self.planes],
                "vectors": {
                    "offset": self.vectors.offset,
                    "bytes": self.vectors.n_bytes,
                    "digest": f"{self.vectors.digest:016x}",
                    "tensors": [
                        {"name": v.name, "length": v.length, "offset": v.offset}
                        for v in self.vectors.tensors
                    ],
                },
                "blobs": [
                    {"name": b.name, "offset": b.offset, "bytes": b.n_bytes, "sha256": b.sha256}
                    for b in self.blobs
                ],
            }
        )


def plane_to_json(shape: PlaneShape, offset: int) -> dict:
    return {
        "name": shape.name,
        "kind": shape.kind,
        "n_items": shape.n_items,
        "per_frame": shape.per_frame,
        "codec": shape.codec,
        "offset": offset,
        "pieces": [
            {"name": p.name, "weight_type": p.weight_type, "n_cols": p.n_cols, "offset": p.offset}
            for p in shape.pieces
        ],
        "parts": [[name, start, stop] for name, (start, stop) in shape.parts.items()],
    }


class _Fields:
    """Typed access to one JSON object whose keys must be exactly `keys`."""

    def __init__(self, path: object, where: str, raw: object, keys: str):
        self.path, self.where = path, where
        if not isinstance(raw, dict):
            self.fail("", "an object", type(raw).__name__)
        expected = keys.split()
        for key in raw:
            if key not in expected:
                self.fail("", f"no keys but {', '.join(expected)}", shown(key))
        for key in expected:
            if key not in raw:
                self.fail("", f"key {key!r}", "none")
        self._raw = raw

    def fail(self, key: str, expected: object, found: object) -> None:
        where = f"{self.where}.{key}" if key else self.where
        raise FormatError(self.path, f"manifest {where}", expected, found)

    def count(self, key: str, low: int, high: int) -> int:
        value = self._raw[key]
        if not is_count(value, low, high):
            self.fail(key, f"an integer from {low} to {high}", shown(value))
        return value

    def name(self, key: str, pattern: re.Pattern, longest: int) -> str:
        value = self._raw[key]
        if not is_name(value, pattern, longest):
            self.fail(key, f"text like {pattern.pattern}, at most {longest} long", shown(value))
        return value

    def text(self, key: str) -> str:
        value = self._raw[key]
        if not isinstance(value, str) or len(value) > MAX_NAME:
            found = f"{len(value)}" if isinstance(value, str) else type(value).__name__
            self.fail(key, f"text of at most {MAX_NAME} characters", found)
        return value

    def object(self, key: str) -> dict:
        value = self._raw[key]
        if not isinstance(value, dict):
            self.fail(key, "an object", type(value).__name__)
        return value

    def list(self, key: str, longest: int) -> list:
        value = self._raw[key]
        if not isinstance(value, list) or len(value) > longest:
            found = f"{len(value)} entries" if isinstance(value, list) else type(value).__name__
            self.fail(key, f"a list of at most {longest}", found)
        return value


def parse_plane(path: object, where: str, raw: object) -> tuple[PlaneShape, int]:
    """(shape, offset of its section) of one plane object."""
    keys = "name kind n_items per_frame codec offset pieces parts"
    plane = _Fields(path, where, raw, keys)
    shape = PlaneShape(
        name=plane.name("name", NAME, MAX_NAME),
        kind=plane.text("kind"),
        n_items=plane.count("n_items", 0, 2**63),
        per_frame=plane.count("per_frame", 0, 2**63),
        codec=plane.text("codec"),
        pieces=tuple(
            _parse_piece(path, f"{where}.pieces[{i}]", piece)
            for i, piece in enumerate(plane.list("pieces", MAX_PIECES))
        ),
        parts=_parse_parts(plane),
    )
    problem = shape.problem()
    if problem:
        raise FormatError(path, f"plane {shape.name} {problem[0]}", problem[1], problem[2])
    return shape, plane.count("offset", 0, MAX_FILE_BYTES)


def _parse_piece(path: object, where: str, raw: object) -> Piece:
    piece = _Fields(path, where, raw, "name weight_type n_cols offset")
    return Piece(
        name=piece.name("name", NAME, MAX_NAME),
        weight_type=piece.text("weight_type"),
        n_cols=piece.count("n_cols", 0, 2**63),
        offset=piece.count("offset", 0, MAX_ITEM_BYTES),
    )


def _parse_parts(plane: _Fields) -> dict[str, tuple[int, int]]:
    parts: dict[str, tuple[int, int]] = {}
    for raw in plane.list("parts", 64):
        well_formed = (
            isinstance(raw, list)
            and len(raw) == 3
            and isinstance(raw[0], str)
            and is_count(raw[1], 0, 2**63)
            and is_count(raw[2], 0, 2**63)
        )
        if not well_formed:
            plane.fail("parts", "[name, start, stop]", shown(raw))
        if raw[0] in parts:
            plane.fail("parts", "each name once", shown(raw[0]))
        parts[raw[0]] = (raw[1], raw[2])
    return parts


def _parse_vectors(path: object, raw: object) -> Vectors:
    section = _Fields(path, "vectors", raw, "offset bytes digest tensors")
    tensors = []
    for i, entry in enumerate(section.list("tensors", MAX_VECTORS)):
        vector = _Fields(path, f"vectors.tensors[{i}]", entry, "name length offset")
        tensors.append(
            Vector(
                vector.name("name", NAME, MAX_NAME),
                vector.count("length", 1, MAX_VECTOR_LENGTH),
                vector.count("offset", 0, MAX_VECTORS_BYTES),
            )
        )
    return Vectors(
        offset=section.count("offset", 0, MAX_FILE_BYTES),
        n_bytes=section.count("bytes", 0, MAX_VECTORS_BYTES),
        digest=int(section.name("digest", _HEX16, 16), 16),
        tensors=tuple(tensors),
    )


def _parse_blob(path: object, where: str, raw: object) -> Blob:
    blob = _Fields(path, where, raw, "name offset bytes sha256")
    return Blob(
        blob.name("name", BLOB_NAME, MAX_BLOB_NAME),
        blob.count("offset", 0, MAX_FILE_BYTES),
        blob.count("bytes", 0, MAX_BLOB_BYTES),
        blob.name("sha256", _HEX64, 64),
    )


def _unique(path: object, what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise FormatError(path, f"manifest {what}", "each name once", repr(name))
        seen.add(name)


def parse_manifest(path: object, raw: bytes) -> Manifest:
    """`raw` as a Manifest, or FormatError naming the field."""
    keys = "family config meta planes vectors blobs"
    root = _Fields(path, "root", parse_json(path, raw), keys)
    planes = tuple(
        parse_plane(path, f"planes[{i}]", plane)
        for i, plane in enumerate(root.list("planes", MAX_PLANES))
    )
    vectors = _parse_vectors(path, root.object("vectors"))
    blobs = tuple(
        _parse_blob(path, f"blobs[{i}]", blob)
        for i, blob in enumerate(root.list("blobs", MAX_BLOBS))
    )
    _unique(path, "planes", [shape.name for shape, _ in planes])
    _unique(path, "vectors", [vector.name for vector in vectors.tensors])
    _unique(path, "blobs", [blob.name for blob in blobs])
    return Manifest(
        family=root.name("family", FAMILY, MAX_FAMILY),
        config=root.object("config"),
        meta=root.object("meta"),
        planes=planes,
        vectors=vectors,
        blobs=blobs,
    )
