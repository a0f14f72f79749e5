"""llama2.c checkpoints, versions 0 and 1: float32 tensors stacked over layers, no directory.

v0: seven int32 (dim, hidden, layers, heads, kv heads, vocab, context; a negative vocab means a
classifier of its own), then the tensors, then two tables of rotary angles that nobody needs.
v1: a 256-byte header with magic, version, the same numbers and a "shared classifier" byte; the
norms come first.  The format states sizes by its numbers alone, so a file is accepted only if its
length is exactly what they say.

Rotary pairs are adjacent here and half-split everywhere else: rows of q and k come permuted.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..errors import CheckpointError
from .base import TableCheckpoint
from .files import SourceFile
from .llama2c_tokenizer import tokenizer_files
from .sampling import sample_digest

MAGIC_V1 = struct.pack("<I", 0x616B3432)
_V0, _V1 = struct.Struct("<7i"), struct.Struct("<Ii7iB")
HEADER_BYTES_V1 = 256
_LIMITS = (2**20, 2**21, 2**12, 2**14, 2**14, 2**24, 2**30)
_NUMBERS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")


@dataclass(frozen=True)
class Header:
    """The checked numbers of a file."""

    version: int
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    shared: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def parse_header(head: bytes, path: object) -> Header:
    """CheckpointError unless the numbers are possible."""
    if head.startswith(MAGIC_V1):
        if len(head) < _V1.size:
            raise CheckpointError(path, "header", f"{_V1.size} bytes", len(head))
        _, version, *numbers, shared = _V1.unpack_from(head)
        if version != 1:
            raise CheckpointError(path, "llama2.c version", "0 or 1", version)
    else:
        if len(head) < _V0.size:
            raise CheckpointError(path, "header", f"{_V0.size} bytes", len(head))
        version, numbers = 0, list(_V0.unpack_from(head))
        shared = numbers[5] > 0
        numbers[5] = abs(numbers[5])
    for name, number, limit in zip(_NUMBERS, numbers, _LIMITS, strict=True):
        if not 1 <= number <= limit:
            raise CheckpointError(path, name, f"1 to {limit}", number)
    header = Header(version, *numbers, bool(shared))
    if header.dim % header.n_heads or header.head_dim % 2:
        raise CheckpointError(path, "dim", f"{header.n_heads} heads of an even size", header.dim)
    if header.n_heads % header.n_kv_heads:
        raise CheckpointError(path, "n_heads", f"a multiple of {header.n_kv_heads}", header.n_heads)
    return header


def stacks(header: Header) -> list[tuple[str, int, tuple[int, ...]]]:
    """(name, layers, shape of one layer's) in file order; a name without {i} is not stacked."""
    h, n = header, header.n_layers
    kv = h.n_kv_heads * h.head_dim
    layer = "model.layers.{i}."
    attention_norm = (layer + "input_layernorm.weight", n, (h.dim,))
    ffn_norm = (layer + "post_attention_layernorm.weight", n, (h.dim,))
    norm = ("model.norm.weight", 1, (h.dim,))
    embedding = ("model.embed_tokens.weight", 1, (h.vocab_size, h.dim))
    attention = [
        (layer + "self_attn.q_proj.weight", n, (h.dim, h.dim)),
        (layer + "self_attn.k_proj.weight", n, (kv, h.dim)),
        (layer + "self_attn.v_proj.weight", n, (kv, h.dim)),
        (layer + "self_attn.o_proj.weight", n, (h.dim, h.dim)),
    ]
    ffn = [
        (layer + "mlp.gate_proj.weight", n, (h.hidden_dim, h.dim)),
        (layer + "mlp.down_proj.weight", n, (h.dim, h.hidden_dim)),
        (layer + "mlp.up_proj.weight", n, (h.hidden_dim, h.dim)),
    ]
    if h.version == 1:
        order = [attention_norm, ffn_norm, norm, embedding, *attention, *ffn]
    else:
        tables = ("rotary tables", 1, (h.seq_len * h.head_dim,))
        order = [embedding, attention_norm, *attention, ffn_norm, *ffn, norm, tables]
    if not h.shared:
        order.append(("lm_head.weight", 1, (h.vocab_size, h.dim)))
    return order


class Llama2cCheckpoint(TableCheckpoint[tuple[int, tuple[int, ...]]]):
    """See Checkpoint.  Names, row order and config are those of the same model elsewhere."""

    kind: ClassVar[str] = "llama2.c"

    def __init__(self, path: Path):
        super().__init__(path)
        self._file = SourceFile(path)
        with self.closed_on_error():
            self._open()

    def _open(self) -> None:
        head = bytes(self._file.read(0, min(HEADER_BYTES_V1, self._file.size)))
        header = self._header = parse_header(head, self.path)
        offset = HEADER_BYTES_V1 if header.version == 1 else _V0.size
        for name, n_layers, shape in stacks(header):
            n_bytes = 4 * int(np.prod(shape, dtype=object))
            if offset + n_layers * n_bytes > self._file.size:
                raise CheckpointError(
                    self.path, name, f"{n_layers * n_bytes} bytes at {offset}", self._file.size
                )
            for i in range(n_layers):
                if name != "rotary tables":
                    self._tensors[name.format(i=i)] = (offset, shape)
                offset += n_bytes
        if offset != self._file.size:
            raise CheckpointError(self.path, "file size", offset, self._file.size)
        self.config = {
            "model_type": "llama",
            "vocab_size": header.vocab_size,
            "hidden_size": header.dim,
            "intermediate_size": header.hidden_dim,
            "num_hidden_layers": header.n_layers,
            "num_attention_heads": header.n_heads,
            "num_key_value_heads": header.n_kv_heads,
            "max_position_embeddings": header.seq_len,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": header.shared,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        self._fingerprint = hashlib.sha256(head + sample_digest(self._file)).hexdigest()

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """A tokenizer.json made of `tok<vocab>.bin` or `tokenizer.bin` beside the file, if any."""
        return tokenizer_files(self.path.parent, self._header.vocab_size)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._at(name)[1]

    def dtype(self, name: str) -> str:
        return "f32"

    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        shape = self.shape(name)
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return self._read(name, start, stop)
        # whole heads, from pairs (0, 1), (2, 3), … to halves
        d = self._header.head_dim
        first, last = start // d * d, min(-(-stop // d) * d, shape[0])
        heads = self._read(name, first, last).reshape(-1, d // 2, 2, shape[1])
        return heads.transpose(0, 2, 1, 3).reshape(-1, shape[1])[start - first : stop - first]

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        offset, shape = self._tensors[name]
        values = np.empty((stop - start, *shape[1:]), "<f4")
        row_bytes = 4 * (shape[1] if len(shape) > 1 else 1)
        if values.nbytes:
            self._file.read_into(offset + start * row_bytes, memoryview(values).cast("B"))
        return values

    @property
    def n_bytes(self) -> int:
        return self._file.size

    def close(self) -> None:
        super().close()
        self._file.close()
