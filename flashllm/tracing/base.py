"""What a trace is once it is believed, and the numbers of the format (TRACES.md).

A Trace hands out bits, a layer and a span of tokens at a time; nothing here knows weights.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

MAGIC = b"\x89FLTRC\r\n"
VERSION = 1
# magic, version, flags, file bytes, tail offset, manifest bytes, table rows, tail digest, zeros
PREAMBLE = struct.Struct("<8sIIQQIIQ8s")
CHECKSUM = struct.Struct("<Q")
PREAMBLE_BYTES = PREAMBLE.size + CHECKSUM.size
assert PREAMBLE_BYTES == 64

BLOCK_ROW = np.dtype([
    ("layer", "<u4"), ("tokens", "<u4"), ("offset", "<u8"), ("stored", "<u4"), ("zero", "<u4"),
    ("digest", "<u8"),
])  # fmt: skip
assert BLOCK_ROW.itemsize == 32

MAX_MANIFEST_BYTES = 2**20
MAX_BLOCKS = 2**20
MAX_LAYERS = 2**13
MAX_BUNDLES = 2**24  # of a layer; of all layers together MAX_ALL_BUNDLES
MAX_ALL_BUNDLES = 2**28
MAX_TOKENS = 2**28
MAX_BUNDLE_BYTES = 2**26
MAX_GROUP = 65536
MAX_BLOCK_BYTES = 64 * 2**20
MAX_NAME = 128


@dataclass(frozen=True)
class LayerInfo:
    """One sparse layer: the plane's name, its bundles, and the bytes of one of them."""

    plane: str
    n_bundles: int
    bundle_bytes: int


class Trace:
    """An accepted trace.

    `path`, `model` and `text` (hex digests), `text_name`, `family`, `n_tokens`, `layers`
    (LayerInfo each), `starts` (int64: tokens at which a fresh context begins), `group_tokens`.
    `block(layer, i)` is the i-th block of a layer, bool [tokens, n_bundles], decoded anew on every
    call; `n_blocks` of them cover the tokens.
    """

    def __init__(self, *, path, manifest: dict, layers, load, n_blocks: int):
        self.path = path
        self.model, self.text = manifest["model"], manifest["text"]
        self.text_name, self.family = manifest["text_name"], manifest["family"]
        self.n_tokens, self.group_tokens = manifest["n_tokens"], manifest["group_tokens"]
        self.starts = np.array(manifest["starts"], np.int64)
        self.layers: tuple[LayerInfo, ...] = tuple(layers)
        self.n_blocks = n_blocks
        self._load = load

    def block(self, layer: int, i: int) -> np.ndarray:
        """Tokens [i * group_tokens, …) of a layer as bool [tokens, n_bundles]."""
        return self._load(layer, i)

    def bits(self, layer: int, n_tokens: int | None = None) -> np.ndarray:
        """A whole layer (or its first tokens) as bool [tokens, n_bundles], a byte per bit."""
        wanted = self.n_tokens if n_tokens is None else min(n_tokens, self.n_tokens)
        out = np.empty((wanted, self.layers[layer].n_bundles), bool)
        for i in range(-(-wanted // self.group_tokens)):
            first = i * self.group_tokens
            stop = min(first + self.group_tokens, wanted)
            out[first:stop] = self.block(layer, i)[: stop - first]
        return out

    def active(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(first int64[n_tokens + 1], ids int32): ids[first[t]:first[t+1]] are token t's, sorted.

        Sparse, so that a whole layer fits where its bits a byte each would not.
        """
        ids, counts = [], []
        for i in range(self.n_blocks):
            block = self.block(layer, i)
            ids.append(np.nonzero(block)[1].astype(np.int32))
            counts.append(np.count_nonzero(block, axis=1))
        first = np.concatenate(([0], np.cumsum(np.concatenate(counts)))).astype(np.int64)
        return first, np.concatenate(ids)
