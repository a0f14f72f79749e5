"""Writing a trace while a model runs: a block's worth of bits per layer in memory, no more.

The file has another name until `commit`; leaving the `with` without it leaves nothing behind.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .._core import xxh64
from ..durable import WholeFile
from ..errors import UsageError
from .base import (
    BLOCK_ROW,
    CHECKSUM,
    MAGIC,
    MAX_ALL_BUNDLES,
    MAX_BLOCKS,
    MAX_BUNDLES,
    MAX_GROUP,
    MAX_LAYERS,
    MAX_MANIFEST_BYTES,
    MAX_NAME,
    PREAMBLE,
    PREAMBLE_BYTES,
    VERSION,
    LayerInfo,
)

# Bits of all layers that wait for their block, and the longest block in tokens and bytes.
WAITING_BYTES = 4 * 2**20
USUAL_GROUP = 1024
BLOCK_BYTES = 2**20
LEVEL = 19  # the data are small and written once
COMPRESSOR_BYTES = 18 * 2**20  # measured at this level with a block of BLOCK_BYTES


def group_tokens_for(layers: list[LayerInfo]) -> int:
    """Tokens of a block: what WAITING_BYTES of all layers and BLOCK_BYTES of one have room for."""
    rows = [-(-layer.n_bundles // 8) for layer in layers]
    return max(1, min(USUAL_GROUP, WAITING_BYTES // sum(rows), BLOCK_BYTES // max(rows)))


class TraceWriter:
    """A trace in the making.

    `add(layer, decided)` takes the deciding pre-activations float32 [T, n_bundles] of the next T
    tokens of a layer (what is above zero is active), or a bool array of that shape; `begin_context`
    says that the next token starts afresh.  All layers must have had the same tokens by `commit`.
    Raises UsageError for what the format cannot hold.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        model: str,
        family: str,
        text: str,
        text_name: str,
        layers: list[LayerInfo],
        group_tokens: int | None = None,
    ):
        if not layers or len(layers) > MAX_LAYERS:
            raise UsageError(f"a trace has 1 to {MAX_LAYERS} sparse layers, not {len(layers)}")
        if max(layer.n_bundles for layer in layers) > MAX_BUNDLES:
            raise UsageError(f"a layer of a trace has at most {MAX_BUNDLES} bundles")
        if sum(layer.n_bundles for layer in layers) > MAX_ALL_BUNDLES:
            raise UsageError(f"a trace has at most {MAX_ALL_BUNDLES} bundles")
        self.group_tokens = group_tokens or group_tokens_for(layers)
        if not 1 <= self.group_tokens <= MAX_GROUP:
            raise UsageError(f"group_tokens is 1 to {MAX_GROUP}, not {self.group_tokens}")
        self.path, self.layers = Path(path), list(layers)
        name = "".join(c if 32 <= ord(c) < 127 else "?" for c in text_name)[:MAX_NAME]
        self._manifest: dict[str, Any] = {
            "family": family, "group_tokens": self.group_tokens, "model": model, "text": text,
            "text_name": name,
            "layers": [[layer.plane, layer.n_bundles, layer.bundle_bytes] for layer in layers],
        }  # fmt: skip
        self._waiting = [
            np.zeros((self.group_tokens, -(-layer.n_bundles // 8)), np.uint8) for layer in layers
        ]
        self._n = [0] * len(layers)  # tokens taken, per layer
        self._starts: list[int] = []
        self._rows: list[tuple] = []
        self._out = WholeFile(self.path)
        self._file = self._out.file
        self._file.write(bytes(PREAMBLE_BYTES))
        self._compressor = _compressor()

    @property
    def n_bytes(self) -> int:
        """Memory of what waits for its block, and of a block in the compressor."""
        return sum(w.nbytes for w in self._waiting) + COMPRESSOR_BYTES

    def begin_context(self) -> None:
        """The next token starts a fresh context."""
        self._starts.append(self._n[0])

    def add(self, layer: int, decided: np.ndarray) -> None:
        """The next tokens of a layer; see the class."""
        waiting, at = self._waiting[layer], 0
        if decided.ndim != 2 or decided.shape[1] != self.layers[layer].n_bundles:
            raise UsageError(f"layer {layer}: {list(decided.shape)} are not tokens x bundles")
        while at < len(decided):
            have = self._n[layer] % self.group_tokens
            n = min(self.group_tokens - have, len(decided) - at)
            waiting[have : have + n] = np.packbits(
                decided[at : at + n] > 0, axis=1, bitorder="little"
            )
            self._n[layer] += n
            at += n
            if have + n == self.group_tokens:
                self._write_block(layer, self.group_tokens)

    def commit(self) -> None:
        """Write what waits, the tail and the preamble; give the file its name."""
        n_tokens = self._n[0]
        if n_tokens == 0 or set(self._n) != {n_tokens}:
            raise UsageError(f"layers of a trace have seen {sorted(set(self._n))} tokens")
        if n_tokens % self.group_tokens:
            for layer in range(len(self.layers)):
                self._write_block(layer, n_tokens % self.group_tokens)
        self._manifest |= {"n_tokens": n_tokens, "starts": self._starts or [0]}
        manifest = json.dumps(self._manifest, sort_keys=True, separators=(",", ":")).encode()
        if len(manifest) > MAX_MANIFEST_BYTES or len(self._rows) > MAX_BLOCKS:
            raise UsageError(f"a trace of {n_tokens} tokens, {len(self._starts)} contexts, is too "
                             "long for the format")
        table = np.array(self._rows, BLOCK_ROW).tobytes()
        tail, offset = table + manifest, self._file.tell()
        self._file.write(tail)
        head = PREAMBLE.pack(
            MAGIC, VERSION, 0, offset + len(tail), offset, len(manifest), len(self._rows),
            xxh64(tail, offset), bytes(8),
        )  # fmt: skip
        self._file.seek(0)
        self._file.write(head + CHECKSUM.pack(xxh64(head)))
        self._out.commit()

    def _write_block(self, layer: int, n_tokens: int) -> None:
        rows = np.ascontiguousarray(self._waiting[layer][:n_tokens])
        stored, offset = self._compressor.compress(rows.data), self._file.tell()
        self._file.write(stored)
        self._rows.append((layer, n_tokens, offset, len(stored), 0, xxh64(stored, offset)))

    def close(self) -> None:
        """Without `commit` before it: nothing is left."""
        self._out.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _compressor():
    import zstandard

    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=False, write_dict_id=False)
