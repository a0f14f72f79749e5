"""Preamble and manifest of a .fit file (FIT.md sections 1 to 3): bytes <-> checked objects.

This is where the file is distrusted: exact keys, every number in its range, sections that follow
each other without holes.  What lies in the sections is checked by their kind when loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass

from ..errors import FormatError, UnsupportedError
from ..units import align_up
from .kinds import FITTED
from .scores import FittedLayer

MAGIC = b"\x89FLFIT\r\n"
VERSION = 1
# magic, version, flags, file bytes, manifest bytes, zero, SHA-256 of the manifest
PREAMBLE = struct.Struct("<8sIIQII32s")
ALIGNMENT = 64
assert PREAMBLE.size == ALIGNMENT

MAX_MANIFEST_BYTES = 4 * 2**20
MAX_LAYERS = 2**13
MAX_BUNDLES = MAX_HIDDEN = 2**24
MAX_UNIT = 2**16
MAX_RECALLS = 16
MAX_NAME = 128
MAX_TOKENS = 2**40

_HEX64 = re.compile(r"[0-9a-f]{64}")
_KEYS = ("hidden_size", "layers", "model", "n_tokens", "recalls", "text", "text_name")
_LAYER_KEYS = (
    "bytes", "form", "kind", "layer", "n_bundles", "offset", "precision", "recall", "sha256",
    "thresholds", "unit",
)  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What a .fit file says of itself before anything of it is loaded."""

    model: str
    hidden_size: int
    text: str
    text_name: str
    n_tokens: int
    recalls: tuple[float, ...]
    layers: tuple[FittedLayer, ...]

    def encode(self) -> bytes:
        """Preamble, manifest and padding; the layers' offsets must be those of `placed`."""
        manifest = self._manifest()
        head = align_up(PREAMBLE.size + len(manifest), ALIGNMENT)
        last = self.layers[-1]
        preamble = PREAMBLE.pack(
            MAGIC, VERSION, 0, last.offset + last.n_bytes, len(manifest), 0,
            hashlib.sha256(manifest).digest(),
        )  # fmt: skip
        return (preamble + manifest).ljust(head, b"\0")

    def head_bytes(self) -> int:
        return align_up(PREAMBLE.size + len(self._manifest()), ALIGNMENT)

    def _manifest(self) -> bytes:
        layers = [
            {
                "bytes": x.n_bytes, "form": x.form, "kind": x.kind, "layer": x.layer,
                "n_bundles": x.n_bundles, "offset": x.offset, "precision": x.precision,
                "recall": x.recall, "sha256": x.sha256, "thresholds": x.thresholds, "unit": x.unit,
            }
            for x in self.layers
        ]  # fmt: skip
        return _canonical({
            "hidden_size": self.hidden_size, "layers": layers, "model": self.model,
            "n_tokens": self.n_tokens, "recalls": self.recalls, "text": self.text,
            "text_name": self.text_name,
        })  # fmt: skip


def parse_preamble(path: object, raw: bytes, *, file_bytes: int) -> tuple[int, bytes]:
    """(manifest bytes, their SHA-256) from the first 64 bytes of a file of `file_bytes`."""
    expect = _Expect(path)
    magic = raw[: len(MAGIC)]
    expect("magic", magic == MAGIC, MAGIC, magic)
    expect("preamble", len(raw) == PREAMBLE.size, f"{PREAMBLE.size} bytes", f"{len(raw)} bytes")
    _, version, flags, stated, manifest_bytes, zero, digest = PREAMBLE.unpack(raw)
    if version != VERSION:
        raise UnsupportedError(f"{path}: fit version {version}; supported: {VERSION}")
    expect("flags", flags == 0 and zero == 0, "zeros", "something else")
    expect("file bytes", stated == file_bytes, f"{file_bytes}, the file's size", stated)
    most = min(MAX_MANIFEST_BYTES, file_bytes - PREAMBLE.size)
    expect("manifest bytes", 2 <= manifest_bytes <= most, f"2 to {most}", manifest_bytes)
    return manifest_bytes, digest


def parse_manifest(path: object, raw: bytes, padding: bytes, *, file_bytes: int) -> Header:
    """The header, from manifest bytes whose digest was checked and the zeros after them."""
    expect = _Expect(path)
    expect("padding", not any(padding), "zeros", "something else")
    # Brackets are counted first: a million of them would exhaust the parser's stack.
    n_brackets = raw.count(b"[") + raw.count(b"{")
    expect("manifest", n_brackets <= 8 * MAX_LAYERS, f"{8 * MAX_LAYERS} brackets", n_brackets)
    try:
        said = json.loads(raw.decode("ascii"))
        same = isinstance(said, dict) and _canonical(said) == raw
    except (ValueError, RecursionError) as error:
        raise FormatError(path, "manifest", "ASCII JSON", str(error)[:200]) from error
    expect("manifest", same, "an object in its one spelling", "something else")
    expect.keys("manifest", said, _KEYS)
    expect("model", expect.is_hex(said["model"]), "a hex digest", said["model"])
    expect("text", expect.is_hex(said["text"]), "a hex digest", said["text"])
    name = said["text_name"]
    good = isinstance(name, str) and len(name) <= MAX_NAME
    expect("text_name", good, f"up to {MAX_NAME} letters", name)
    hidden = expect.count("hidden_size", said["hidden_size"], 1, MAX_HIDDEN)
    n_tokens = expect.count("n_tokens", said["n_tokens"], 1, MAX_TOKENS)
    recalls = expect.numbers("recalls", said["recalls"], None)
    ascending = all(a < b for a, b in zip((0.0, *recalls), recalls, strict=False))
    expect("recalls", ascending and recalls[-1] < 1, "ascending, between 0 and 1", recalls)
    rows = said["layers"]
    good = isinstance(rows, list) and 1 <= len(rows) <= MAX_LAYERS
    expect("layers", good, f"1 to {MAX_LAYERS}", type(rows).__name__)
    layers: list[FittedLayer] = []
    end = align_up(PREAMBLE.size + len(raw), ALIGNMENT)
    for i, row in enumerate(rows):
        layer = _parse_layer(expect, f"layers[{i}]", row, hidden, len(recalls))
        ascending = not layers or layers[-1].layer < layer.layer
        expect(f"layers[{i}].layer", ascending, "more than the one before", layer.layer)
        expect(f"layers[{i}].offset", layer.offset == end, end, layer.offset)
        end += layer.n_bytes
        layers.append(layer)
    expect("sections", end == file_bytes, f"to end at {file_bytes}", end)
    return Header(said["model"], hidden, said["text"], name, n_tokens, recalls, tuple(layers))


def section_bytes(layer: FittedLayer) -> int:
    """Bytes of a layer's section, padding included."""
    kind = FITTED[layer.kind]
    return align_up(kind.weight_bytes(layer) + kind.rest_bytes(layer), ALIGNMENT)


def _parse_layer(expect: _Expect, where: str, row: object, hidden: int, n: int) -> FittedLayer:
    expect.keys(where, row, _LAYER_KEYS)
    kind = row["kind"]
    good = isinstance(kind, str) and kind in FITTED
    expect(f"{where}.kind", good, " or ".join(FITTED), kind)
    expect(f"{where}.form", isinstance(row["form"], dict), "an object", type(row["form"]).__name__)
    expect(f"{where}.sha256", expect.is_hex(row["sha256"]), "a hex digest", row["sha256"])
    layer = FittedLayer(
        layer=expect.count(f"{where}.layer", row["layer"], 0, MAX_LAYERS),
        kind=kind,
        n_bundles=expect.count(f"{where}.n_bundles", row["n_bundles"], 1, MAX_BUNDLES),
        hidden_size=hidden,
        unit=expect.count(f"{where}.unit", row["unit"], 1, MAX_UNIT),
        form=row["form"],
        thresholds=expect.numbers(f"{where}.thresholds", row["thresholds"], n),
        recall=expect.numbers(f"{where}.recall", row["recall"], n),
        precision=expect.numbers(f"{where}.precision", row["precision"], n),
        offset=expect.count(f"{where}.offset", row["offset"], 0, 2**60),
        n_bytes=expect.count(f"{where}.bytes", row["bytes"], 1, 2**60),
        sha256=row["sha256"],
    )
    problem = FITTED[kind].form_problem(layer)
    if problem is not None:
        raise FormatError(expect.path, f"{where}.{problem[0]}", *problem[1:])
    expect(f"{where}.bytes", layer.n_bytes == section_bytes(layer), section_bytes(layer),
           layer.n_bytes)  # fmt: skip
    return layer


class _Expect:
    """Checks that raise FormatError about one file; what was found is cut to a message's length."""

    def __init__(self, path: object):
        self.path = path

    def __call__(self, where: str, good: bool, expected: object, found: object) -> None:
        if not good:
            raise FormatError(self.path, where, expected, str(found)[:200])

    def keys(self, where: str, value: object, keys: tuple[str, ...]) -> None:
        self(where, isinstance(value, dict), "an object", type(value).__name__)
        self(where, set(value) == set(keys), sorted(keys), sorted(value))

    def count(self, where: str, value: object, low: int, high: int) -> int:
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        self(where, good, f"{low} to {high}", value)
        return value

    def numbers(self, where: str, value: object, n: int | None) -> tuple[float, ...]:
        """`n` finite numbers; None: 1 to MAX_RECALLS of them."""
        good = isinstance(value, list) and 1 <= len(value) <= MAX_RECALLS
        self(where, good and n in (None, len(value)), f"{n or 'some'} numbers", value)
        for item in value:
            number = isinstance(item, int | float) and not isinstance(item, bool)
            finite = number and abs(item) < 2**60 and math.isfinite(item)
            self(where, finite, "finite numbers", item)
        return tuple(float(item) for item in value)

    @staticmethod
    def is_hex(value: object) -> bool:
        return isinstance(value, str) and bool(_HEX64.fullmatch(value))


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
