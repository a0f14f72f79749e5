"""Reading traces, believing nothing (TRACES.md section 4).

`read_trace` checks preamble, tail and block table; blocks are checked and decoded when asked for.
Of a file that is accepted the blocks are held as they are stored: a trace is small beside what it
describes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from .._core import xxh64
from ..codecs.zstd import decompress
from ..errors import (
    ChecksumError,
    CodecError,
    FormatError,
    UnsupportedError,
)
from ..regular import open_regular, read_exactly
from .base import (
    BLOCK_ROW,
    CHECKSUM,
    MAGIC,
    MAX_ALL_BUNDLES,
    MAX_BLOCK_BYTES,
    MAX_BLOCKS,
    MAX_BUNDLE_BYTES,
    MAX_BUNDLES,
    MAX_GROUP,
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    MAX_NAME,
    MAX_TOKENS,
    PREAMBLE,
    PREAMBLE_BYTES,
    VERSION,
    LayerInfo,
    Trace,
)

MAX_FILE_BYTES = 2**30  # of what is read whole
_KEYS = {
    "family": str, "group_tokens": int, "layers": list, "model": str, "n_tokens": int,
    "starts": list, "text": str, "text_name": str,
}  # fmt: skip


def read_trace(path: str | os.PathLike) -> Trace:
    """The trace at `path`.

    Raises FormatError (ChecksumError, CodecError) for a file that breaks the format,
    UnsupportedError for another version, FlashReadError when it cannot be read.
    """
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if not PREAMBLE_BYTES <= size <= MAX_FILE_BYTES:
            expected = f"{PREAMBLE_BYTES} to {MAX_FILE_BYTES} bytes"
            raise FormatError(path, "file size", expected, f"{size} bytes")
        head = read_exactly(fd, path, 0, PREAMBLE_BYTES, "preamble")
        tail_offset, manifest_bytes, n_rows, digest = _parse_preamble(path, head, size)
        tail = read_exactly(fd, path, tail_offset, size - tail_offset, "tail")
        found = xxh64(tail, tail_offset)
        if found != digest:
            raise ChecksumError(path, "tail", digest, found)
        manifest = _parse_manifest(path, tail[-manifest_bytes:])
        layers = _parse_layers(path, manifest)
        _check_tokens(path, manifest)
        table = np.frombuffer(tail, BLOCK_ROW, n_rows)
        places = _check_table(path, table, manifest, layers, tail_offset)
        raw = read_exactly(fd, path, 0, tail_offset, "blocks")
    finally:
        os.close(fd)

    def load(layer: int, i: int) -> np.ndarray:
        return _load_block(path, raw, table[places[layer][i]], layers[layer].n_bundles)

    return Trace(
        path=Path(path), manifest=manifest, layers=layers, load=load, n_blocks=len(places[0])
    )


def _expect(path: object, where: str, good: bool, expected: object, found: object) -> None:
    if not good:
        raise FormatError(path, where, expected, str(found)[:200])


def _parse_preamble(path: object, raw: bytes, size: int) -> tuple[int, int, int, int]:
    """(tail offset, manifest bytes, table rows, digest of the tail), held against the size."""
    magic, version, flags, file_bytes, tail, manifest_bytes, n_rows, digest, zeros = (
        PREAMBLE.unpack_from(raw)
    )
    _expect(path, "magic", magic == MAGIC, MAGIC, magic)
    if version != VERSION:
        raise UnsupportedError(f"{path}: trace version {version}; supported: {VERSION}")
    (stated,) = CHECKSUM.unpack_from(raw, PREAMBLE.size)
    found = xxh64(raw[: PREAMBLE.size])
    if stated != found:
        raise ChecksumError(path, "preamble", stated, found)
    _expect(path, "flags", flags == 0 and zeros == bytes(8), "zeros", "something else")
    _expect(path, "file bytes", file_bytes == size, file_bytes, size)
    _expect(path, "manifest bytes", 2 <= manifest_bytes <= MAX_MANIFEST_BYTES,
            f"2 to {MAX_MANIFEST_BYTES}", manifest_bytes)
    _expect(path, "table rows", 1 <= n_rows <= MAX_BLOCKS, f"1 to {MAX_BLOCKS}", n_rows)
    n_bytes = n_rows * BLOCK_ROW.itemsize + manifest_bytes
    _expect(path, "tail", tail >= PREAMBLE_BYTES and tail + n_bytes == size,
            f"{n_bytes} bytes that end the file", f"an offset of {tail}")
    return tail, manifest_bytes, n_rows, digest


def _parse_manifest(path: object, raw: bytes) -> dict:
    # Brackets are counted first: a million of them would exhaust the parser's stack.
    n_brackets = raw.count(b"[") + raw.count(b"{")
    _expect(path, "manifest", n_brackets <= MAX_LAYERS + 3, "few brackets", n_brackets)
    try:
        manifest = json.loads(raw.decode("ascii"))
        same = isinstance(manifest, dict) and json.dumps(
            manifest, sort_keys=True, separators=(",", ":"), allow_nan=False
        ).encode() == raw
    except (ValueError, RecursionError) as error:
        raise FormatError(path, "manifest", "ASCII JSON", str(error)[:200]) from error
    _expect(path, "manifest", same, "an object in its one spelling", "something else")
    _expect(path, "manifest", set(manifest) == set(_KEYS), sorted(_KEYS), sorted(manifest))
    for key, kind in _KEYS.items():
        value = manifest[key]
        good = isinstance(value, kind) and not isinstance(value, bool)
        _expect(path, f"manifest {key}", good, kind.__name__, type(value).__name__)
        if kind is str:
            _expect(path, f"manifest {key}", len(value) <= MAX_NAME, f"{MAX_NAME} letters", value)
    return manifest


def _count(path: object, where: str, value: object, low: int, high: int) -> int:
    good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _expect(path, where, good, f"{low} to {high}", value)
    return value


def _parse_layers(path: object, manifest: dict) -> list[LayerInfo]:
    layers: list[LayerInfo] = []
    _count(path, "layers", len(manifest["layers"]), 1, MAX_LAYERS)
    for i, row in enumerate(manifest["layers"]):
        where = f"layers[{i}]"
        good = isinstance(row, list) and len(row) == 3 and isinstance(row[0], str)
        _expect(path, where, good and len(row[0]) <= MAX_NAME, "name, bundles, bytes", row)
        n_bundles = _count(path, f"{where} bundles", row[1], 1, MAX_BUNDLES)
        n_bytes = _count(path, f"{where} bundle bytes", row[2], 1, MAX_BUNDLE_BYTES)
        layers.append(LayerInfo(row[0], n_bundles, n_bytes))
    _count(path, "bundles of all layers", sum(x.n_bundles for x in layers), 1, MAX_ALL_BUNDLES)
    return layers


def _check_tokens(path: object, manifest: dict) -> None:
    n_tokens = _count(path, "n_tokens", manifest["n_tokens"], 1, MAX_TOKENS)
    _count(path, "group_tokens", manifest["group_tokens"], 1, MAX_GROUP)
    before = -1
    for i, start in enumerate(manifest["starts"]):
        low = 0 if i == 0 else before + 1
        before = _count(path, f"starts[{i}]", start, low, 0 if i == 0 else n_tokens - 1)
    _expect(path, "starts", before >= 0, "a first context", "none")


def _check_table(
    path: object, table: np.ndarray, manifest: dict, layers: list[LayerInfo], tail_offset: int
) -> np.ndarray:
    """int [n_layers, blocks of each]: rows of the table.

    Blocks lie without gaps or overlaps, and each has the promised tokens.
    """
    stored = table["stored"].astype(np.int64)
    ends = PREAMBLE_BYTES + np.cumsum(stored)
    _expect(path, "blocks", bool((table["offset"] == (ends - stored).astype(np.uint64)).all()),
            "one after the other", "gaps or overlaps")
    _expect(path, "blocks", int(ends[-1]) == tail_offset, f"an end at {tail_offset}", ends[-1])
    _expect(path, "block table", not table["zero"].any(), "zeros", "something else")
    most = int(table["layer"].max())
    _expect(path, "block layer", most < len(layers), f"below {len(layers)}", most)
    group, n_tokens = manifest["group_tokens"], manifest["n_tokens"]
    n_blocks = -(-n_tokens // group)
    counts = np.bincount(table["layer"], minlength=len(layers))
    _expect(path, "blocks", bool((counts == n_blocks).all()),
            f"{n_blocks} of each layer", f"{counts.min()} to {counts.max()}")  # fmt: skip
    places = np.argsort(table["layer"], kind="stable").reshape(len(layers), n_blocks)
    expected = np.full(n_blocks, group)
    expected[-1] = n_tokens - (n_blocks - 1) * group
    good = (table["tokens"][places] == expected).all()
    _expect(path, "tokens of blocks", bool(good), f"{group}, {n_tokens} in all", "others")
    widest = -(-max(layer.n_bundles for layer in layers) // 8) * int(expected[0])
    _expect(path, "block", widest <= MAX_BLOCK_BYTES, f"at most {MAX_BLOCK_BYTES} bytes", widest)
    return places


def _load_block(path: object, raw: bytes, row: np.void, n_bundles: int) -> np.ndarray:
    offset, n_stored, tokens = int(row["offset"]), int(row["stored"]), int(row["tokens"])
    stored = raw[offset : offset + n_stored]
    where = f"block at {offset}"
    found = xxh64(stored, offset)
    if found != int(row["digest"]):
        raise ChecksumError(path, where, int(row["digest"]), found)
    row_bytes = -(-n_bundles // 8)
    import zstandard

    try:
        content = decompress(zstandard.ZstdDecompressor(), stored, tokens * row_bytes)
    except CodecError as error:
        raise CodecError(path, f"{where}, {error.where}", error.expected, error.found) from error
    bits = np.frombuffer(content, np.uint8).reshape(tokens, row_bytes)
    bits = np.unpackbits(bits, axis=1, bitorder="little").view(bool)
    if bits[:, n_bundles:].any():
        raise FormatError(path, where, "zeros beyond the last bundle", "ones")
    return bits[:, :n_bundles]
