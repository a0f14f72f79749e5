"""Makes the golden containers of format version 1: `python -m tests.golden.make_container_golden`.

They are made of counted bytes, not of weights, so that no rounding anywhere can change them.  The
committed files must stay readable for as long as version 1 is, and be written again byte for byte
(the coded one: by the same zstd).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flashllm.container import ContainerWriter, lay_out_pieces

HERE = Path(__file__).parent
CONFIG = {"hidden_size": 64, "norm_eps": 1e-05, "rope": {"theta": 10000.0}, "tie": False}

# name, kind, pieces, items, per frame, codec, parts
RAW = [
    ("layers.0.qkv", "rows", [("row", "int4", 64)], 40, 16, "raw", {"q": (0, 24), "k": (24, 40)}),
    ("layers.0.ffn", "bundles", [("up", "int8", 33), ("down", "f32", 5)], 9, 2, "raw", {}),
]
CODED = [
    ("embed", "rows", [("row", "bf16", 64)], 30, 8, "planes", {}),
    ("head", "rows", [("row", "f16", 50)], 12, 12, "zstd", {}),
]


def items_of(pieces: list[tuple[str, str, int]], n_items: int) -> np.ndarray:
    """uint8[n_items, stride]: low bytes count, high bytes repeat, gaps are zero."""
    placed = lay_out_pieces(pieces)
    stride = -(-(placed[-1].offset + placed[-1].row_bytes) // 16) * 16
    items = np.zeros((n_items, stride), np.uint8)
    for piece in placed:
        at = np.arange(n_items * piece.row_bytes, dtype=np.uint32)
        values = np.where(at % 2, 61 + at // 2 % 3, at * 37 % 251).astype(np.uint8)
        rows = values.reshape(n_items, piece.row_bytes)
        items[:, piece.offset : piece.offset + piece.row_bytes] = rows
    return items


def _write_planes(writer: ContainerWriter, planes: list[tuple]) -> None:
    for name, kind, pieces, n_items, per_frame, codec, parts in planes:
        laid_out = lay_out_pieces(pieces)
        if writer.begin_plane(name, kind, laid_out, n_items, per_frame, codec, parts=parts):
            writer.write_items(items_of(pieces, n_items))
            writer.end_plane()


def make_raw(path: Path) -> None:
    source = {"family": "llama", "config": CONFIG, "source": "golden", "alignment": 512}
    with ContainerWriter(path, **source, meta={"converter": "golden 1"}) as writer:
        _write_planes(writer, RAW)
        writer.commit()


def make_coded(path: Path) -> None:
    with ContainerWriter(path, family="opt", config={}, options={"codec": "auto"}) as writer:
        _write_planes(writer, CODED)
        writer.commit()


def make_carried(path: Path) -> None:
    with ContainerWriter(path, family="rwkv", config={}, alignment=16384) as writer:
        writer.add_vectors(
            {
                "final_norm.weight": np.arange(1, 65, dtype=np.float32) / 64,
                "final_norm.bias": np.zeros(3, np.float32),
            }
        )
        writer.add_blob("tokenizer.json", b'{"model":{"type":"BPE"}}')
        writer.add_blob("chat_template.jinja", "{{ messages }} \u2603\n".encode())
        writer.commit()


GOLDEN = {"raw": make_raw, "coded": make_coded, "carried": make_carried}


def golden_path(name: str) -> Path:
    return HERE / f"container_v1_{name}.flash"


if __name__ == "__main__":
    for name, make in GOLDEN.items():
        golden_path(name).unlink(missing_ok=True)
        make(golden_path(name))
