"""RWKV under its official key names, or in Hugging Face's RWKV-7 layout: safetensors or PyTorch.

Both are brought to the canonical form of rwkv_names.py as they are read: decays exponentiated, the
low-rank matrices of the official layout transposed, v7's six mixing vectors joined.  What changes
is small; the large matrices are handed through untouched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import CheckpointError
from .base import STORAGE_DTYPES, Checkpoint, TableCheckpoint
from .rwkv_names import (
    MIXED_V6,
    STACKED,
    byte_vocabulary,
    canonical_shape,
    config_of,
    version_of,
)

MIXED_V7 = "rwkvag"
_TRANSPOSED = re.compile(r".*\.att\.(?:[wavg][12]|time_maa_w1|time_decay_w[12])")
_MIX_V7 = re.compile(r"(.*\.att\.x_)([rwkvag])")

_HUGGING_FACE = [
    (r"model\.embeddings\.weight", "emb.weight"),
    (r"lm_head\.weight", "head.weight"),
    (r"model\.norm\.(weight|bias)", r"ln_out.\1"),
    (r"model\.layers\.(\d+)\.pre_norm\.(weight|bias)", r"blocks.\1.ln0.\2"),
    (r"model\.layers\.(\d+)\.attn_norm\.(weight|bias)", r"blocks.\1.ln1.\2"),
    (r"model\.layers\.(\d+)\.ffn_norm\.(weight|bias)", r"blocks.\1.ln2.\2"),
    (r"model\.layers\.(\d+)\.attn\.g_norm\.(weight|bias)", r"blocks.\1.att.ln_x.\2"),
    (r"model\.layers\.(\d+)\.attn\.r_proj\.weight", r"blocks.\1.att.receptance.weight"),
    (r"model\.layers\.(\d+)\.attn\.k_proj\.weight", r"blocks.\1.att.key.weight"),
    (r"model\.layers\.(\d+)\.attn\.v_proj\.weight", r"blocks.\1.att.value.weight"),
    (r"model\.layers\.(\d+)\.attn\.o_proj\.weight", r"blocks.\1.att.output.weight"),
    (r"model\.layers\.(\d+)\.attn\.([wavg])_lora\.lora\.0\.weight", r"blocks.\1.att.\g<2>1"),
    (r"model\.layers\.(\d+)\.attn\.([wavg])_lora\.lora\.2\.weight", r"blocks.\1.att.\g<2>2"),
    (r"model\.layers\.(\d+)\.attn\.([wav])_lora\.lora\.2\.bias", r"blocks.\1.att.\g<2>0"),
    (r"model\.layers\.(\d+)\.attn\.(x_[rwkvag]|k_k|k_a|r_k)", r"blocks.\1.att.\2"),
    (r"model\.layers\.(\d+)\.ffn\.(x_k|key\.weight|value\.weight)", r"blocks.\1.ffn.\2"),
]  # fmt: skip


def official_name(name: str) -> str:
    """The official key of a Hugging Face tensor; any other name as it is."""
    for pattern, replacement in _HUGGING_FACE:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return name


def is_rwkv(names: list[str]) -> bool:
    """Whether these are the names of an RWKV model in either layout."""
    return {"emb.weight", "blocks.0.ln0.weight"} <= {official_name(name) for name in names}


@dataclass(frozen=True)
class _Tensor:
    """A tensor as it is handed out; `read(start, stop)` gives rows in storage dtype."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], np.ndarray]


class RWKVSafetensors(TableCheckpoint[_Tensor]):
    """See Checkpoint; `source` holds the tensors as they are named there; closed with this one."""

    kind: ClassVar[str] = "safetensors (RWKV)"

    def __init__(self, source: Checkpoint):
        super().__init__(source.path)
        self._source = source
        with self.closed_on_error():
            self._open()

    def _open(self) -> None:
        places = {official_name(name): name for name in self._source.names()}
        self._hugging_face = "emb.weight" not in self._source
        shapes = {name: self._source.shape(place) for name, place in places.items()}
        self._version = version_of(shapes)
        for name, place in places.items():
            mix = _MIX_V7.fullmatch(name)
            if mix and mix[2] == MIXED_V7[0]:
                parts = [places.get(mix[1] + x) for x in MIXED_V7]
                if None in parts:
                    raise CheckpointError(self.path, f"tensors {mix[1]}*", list(MIXED_V7), "fewer")
                self._tensors[mix[1] + MIXED_V7] = self._flat(parts)
            elif not mix:
                self._add(name, place)
        self.config = config_of(self.path, self._as_exported(shapes))

    def _as_exported(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """`shapes` with what config_of reads the ranks from turned as rwkv.cpp turns it."""
        if self._hugging_face:
            return shapes
        turned = dict(shapes)
        for name, shape in shapes.items():
            if (_TRANSPOSED.fullmatch(name) or name.endswith(STACKED)) and len(shape) > 1:
                turned[name] = (*shape[:-2], shape[-1], shape[-2])
        return turned

    def _add(self, name: str, place: str) -> None:
        shape, dtype = self._source.shape(place), self._source.dtype(place)
        if name.endswith(STACKED) and len(shape) == 3 and shape[0] == len(MIXED_V6):
            for i, x in enumerate(MIXED_V6):
                self._tensors[f"{name}.{x}"] = _Tensor(
                    (shape[2], shape[1]), dtype, self._turned(place, i)
                )
        elif _TRANSPOSED.fullmatch(name) and len(shape) == 2 and not self._hugging_face:
            self._tensors[name] = _Tensor(shape[::-1], dtype, self._turned(place, None))
        elif len(canonical_shape(name, shape)) == 2:
            self._tensors[name] = _Tensor(
                shape, dtype, lambda start, stop: self._source.stored_rows(place, start, stop)
            )
        else:
            self._tensors[name] = self._flat([place], _change(self._version, name))

    def _turned(self, place: str, index: int | None) -> Callable[[int, int], np.ndarray]:
        def read(start: int, stop: int) -> np.ndarray:
            n_rows = self._source.shape(place)[0]
            if index is None:
                stored = self._source.stored_rows(place, 0, n_rows)
            else:
                stored = self._source.stored_rows(place, index, index + 1)[0]
            return np.ascontiguousarray(stored[:, start:stop].T)

        return read

    def _flat(self, places: list[str], change: Callable | None = None) -> _Tensor:
        """Tensors one after another as a float32 vector, through `change`."""
        n_values = sum(int(np.prod(self._source.shape(p), dtype=object)) for p in places)
        unread = [p for p in places if self._source.dtype(p) not in STORAGE_DTYPES]

        def read(start: int, stop: int) -> np.ndarray:
            parts = [self._source.rows(p, 0, self._source.shape(p)[0]).ravel() for p in places]
            values = np.concatenate(parts)
            return (values if change is None else change(values))[start:stop]

        return _Tensor((n_values,), self._source.dtype(unread[0]) if unread else "f32", read)

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        found = self._source.tokenizer_files
        return found or (byte_vocabulary() if self.config["vocab_size"] == 256 else {})

    def shape(self, name: str) -> tuple[int, ...]:
        return self._at(name).shape

    def dtype(self, name: str) -> str:
        return self._at(name).dtype

    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._at(name).read(start, stop)

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    @property
    def files(self) -> list[Path]:
        return self._source.files

    @property
    def n_bytes(self) -> int:
        return self._source.n_bytes

    def close(self) -> None:
        super().close()
        self._source.close()


def _change(version: str, name: str) -> Callable[[np.ndarray], np.ndarray] | None:
    """What rwkv.cpp's exporter does to the values of this vector."""
    if name.endswith(".time_decay") and version == "4":
        return lambda w: -np.exp(w)
    if name.endswith(".time_decay") and version in ("5.1", "5.2"):
        return lambda w: np.exp(-np.exp(w))
    if name.endswith(".time_first") and version == "5.1":
        return np.exp
    return None
