"""Small containers for tests: every codec, weight type, kind and section, from fixed seeds."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from flashllm._core import xxh64

from flashllm.codecs import CODECS
from flashllm.container import Container, ContainerWriter, Plane, lay_out_pieces, open_container
from flashllm.container.header import HEADER_BYTES
from flashllm.quant import WEIGHT_TYPES

# name, kind, pieces, items, per frame, codec, parts
PLANES = [
    ("embed", "rows", [("row", "bf16", 48)], 21, 4, "planes", {}),
    ("layers.0.qkv", "rows", [("row", "int8", 40)], 24, 8, "raw", {"q": (0, 16), "k": (16, 24)}),
    ("layers.0.ffn", "bundles", [("up", "int4", 33), ("down", "f32", 3)], 19, 5, "zstd", {}),
    ("layers.1.ffn", "bundles", [("gate", "f16", 7), ("up", "f16", 9)], 6, 6, "planes", {}),
]
VECTORS = {
    "final_norm.weight": np.linspace(0.5, 1.5, 48, dtype=np.float32),
    "layers.0.qkv.bias": np.arange(5, dtype=np.float32),
}
BLOBS = {"tokenizer.json": b'{"version":"1.0"}', "chat_template.jinja": b"", "a": b"x" * 70}
CONFIG = {"hidden_size": 48, "norm_eps": 1e-05, "tie": True}


def make_items(pieces: list[tuple[str, str, int]], n_items: int, *, seed: int = 0) -> np.ndarray:
    """Encoded items uint8[n_items, stride] with random weights."""
    rng = np.random.default_rng(seed)
    placed = lay_out_pieces(pieces)
    stride = -(-(placed[-1].offset + placed[-1].row_bytes) // 16) * 16
    items = np.zeros((n_items, stride), np.uint8)
    for piece in placed:
        rows = (rng.standard_normal((n_items, piece.n_cols)) * 0.05).astype(np.float32)
        encoded = WEIGHT_TYPES[piece.weight_type].encode(rows)
        items[:, piece.offset : piece.offset + piece.row_bytes] = encoded
    return items


def write_plane(writer: ContainerWriter, plane: tuple, items: np.ndarray, *, step: int = 7) -> bool:
    name, kind, pieces, n_items, per_frame, codec, parts = plane
    if not writer.begin_plane(
        name, kind, lay_out_pieces(pieces), n_items, per_frame, codec, parts=parts
    ):
        return False
    for start in range(0, n_items, step):
        writer.write_items(items[start : start + step])
    writer.end_plane()
    return True


def make_container(path, *, source: str = "source", alignment: int = 512, planes=PLANES, **more):
    """Write PLANES, VECTORS and BLOBS; returns {plane name: its items}."""
    items = {plane[0]: make_items(plane[2], plane[3], seed=i) for i, plane in enumerate(planes)}
    with ContainerWriter(
        path, family="llama", config=CONFIG, alignment=alignment, source=source, **more
    ) as writer:
        for plane in planes:
            write_plane(writer, plane, items[plane[0]])
        writer.add_vectors(VECTORS)
        for name, data in BLOBS.items():
            writer.add_blob(name, data)
        writer.commit()
    return items


def read_plane(container: Container, plane: Plane) -> np.ndarray:
    """Items of a plane, by the plainest means: uint8[n_frames * per_frame, stride]."""
    raw = container.path.read_bytes()
    out = np.full((plane.n_frames, plane.frame_bytes), 255, np.uint8)
    for frame in range(plane.n_frames):
        offset, stored = int(plane.offsets[frame]), int(plane.stored[frame])
        data = raw[offset : offset + stored]
        assert xxh64(data, plane.seed(frame)) == int(plane.digests[frame])
        CODECS[plane.codec].decode_into(data, memoryview(out[frame]))
    return out.reshape(-1, plane.stride)


class Forger:
    """Takes a container apart so that a test can lie in one place and seal the rest again."""

    def __init__(self, path):
        self.path = path
        self.raw = bytearray(path.read_bytes())
        with open_container(path) as container:
            self.superblock = container.superblock
        at = self.superblock.index_offset
        self.body = bytes(self.raw[:at])
        self.manifest = bytes(self.raw[at : at + self.superblock.manifest_bytes])
        self.tables = bytearray(self.raw[at + self.superblock.manifest_bytes :])

    def seal(self, path, **fields: int):
        """Write `body`, `manifest` and `tables` with right hashes; `fields` replace true ones."""
        index = self.manifest + bytes(self.tables)
        values = {
            "magic": b"\x89FLASH\r\n",
            "version": 1,
            "header_bytes": HEADER_BYTES,
            "flags": 0,
            "file_id": self.superblock.file_id,
            "file_bytes": len(self.body) + len(index),
            "alignment": self.superblock.alignment,
            "reserved": 0,
            "index_offset": len(self.body),
            "index_bytes": len(index),
            "manifest_bytes": len(self.manifest),
            "index_sha256": hashlib.sha256(index).digest(),
            "spare": bytes(16),
        }
        assert set(fields) <= set(values)
        values.update(fields)
        head = struct.pack("<8sIIQQQIIQQQ32s16s", *values.values())
        head += struct.pack("<Q", xxh64(head))
        path.write_bytes(head + self.body[HEADER_BYTES:] + index)
        return path
