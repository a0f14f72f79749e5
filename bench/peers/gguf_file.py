"""A container as a GGUF file for llama.cpp and its relatives: the same weights, the same bits.

    PYTHON_WITH_GGUF bench/peers/gguf_file.py MODEL.flash OUT.gguf

int8 rows are Q8_0's blocks and int4 rows Q4_0's (32 values, one f16 scale), so they are copied and
not quantised again; only their bytes change places.  The exception is down: a container stores its
columns, GGUF its rows, so it is decoded, turned and quantised once more.  There is no vocabulary in
the file (`no_vocab`): benchmarks feed ids.

What llama.cpp cannot express is written as the nearest architecture of the same shape; what differs
is printed, for the card: a figure of speed stands, the text does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flashllm.container import Container, open_container  # noqa: E402
from flashllm.conversion.from_container import PlaneReader  # noqa: E402
from flashllm.errors import UnsupportedError  # noqa: E402
from flashllm.models.base import ModelConfig  # noqa: E402
from flashllm.models.configs import config_from_dict  # noqa: E402
from flashllm.quant import WEIGHT_TYPES  # noqa: E402
from flashllm.quant.base import GROUP  # noqa: E402

GGML_NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
PIECES = {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: `shape` of values, rows last but one; `make` gives its bytes."""

    name: str
    shape: tuple[int, ...]
    weight_type: str
    make: Callable[[], np.ndarray]

    def __post_init__(self) -> None:
        if self.weight_type in ("int8", "int4") and self.shape[-1] % GROUP:
            raise UnsupportedError(f"GGUF: {self.name} has {self.shape[-1]} columns, not a "
                                   f"multiple of {GROUP}")  # fmt: skip

    @property
    def n_bytes(self) -> int:
        row = WEIGHT_TYPES[self.weight_type].row_bytes(self.shape[-1])
        return row * int(np.prod(self.shape[:-1]))


def architecture(config: ModelConfig) -> tuple[str, str]:
    """(llama.cpp's name, what differs from our model or nothing)."""
    if config.family == "opt":
        if not (config.norm_before and config.norm_affine and config.bias and not config.projected):
            raise UnsupportedError("GGUF: only OPT with affine norms before, biases, one width")
        return "gpt2", "GELU in place of ReLU (no OPT in llama.cpp)"
    if config.family == "moe" and config.model_type in ("qwen3_moe", "olmoe"):
        return config.model_type.replace("_", ""), ""
    if config.family == "llama" and config.rope.kind == "default" and not config.mlp_bias:
        if config.model_type in ("qwen2", "qwen3") and config.gated:
            return config.model_type, _activation_note(config)
        if config.gated and not config.qkv_bias:
            return "llama", _activation_note(config)
        if config.activation in ("relu2", "relu") and not config.qkv_bias:
            note = "" if config.activation == "relu2" else "squared ReLU in place of ReLU"
            return "arcee", note
    raise UnsupportedError(f"GGUF: no architecture for {config.family} {config.model_type}")


def _activation_note(config: ModelConfig) -> str:
    return "" if config.activation == "silu" else f"SiLU in place of {config.activation}"


class Weights:
    """Items of a container's planes as GGUF wants them."""

    def __init__(self, container: Container):
        self._container = container
        self._vectors = container.load_vectors()

    def vector(self, ours: str) -> np.ndarray:
        return self._vectors[ours]

    def has_vector(self, ours: str) -> bool:
        return ours in self._vectors

    def has_plane(self, ours: str) -> bool:
        return ours in self._container.planes

    def rows(
        self, name: str, ours: str, part: str | None = None, *, heads: int = 0, first: int = 0
    ) -> Tensor:
        """A matrix stored by rows; `heads`: turned from halves to pairs, as rotary q and k are;
        `first`: rows that are left out at the start."""
        plane = self._container.planes[ours]
        start, stop = plane.parts[part] if part else (0, plane.n_items)
        piece = plane.pieces[0]

        def make() -> np.ndarray:
            reader = PlaneReader(plane, self._container)
            raw = reader.items(piece, start + first, stop)
            if heads:
                raw = raw.reshape(heads, 2, -1, raw.shape[1]).swapaxes(1, 2)
                raw = raw.reshape(stop - start, -1)
            return blocks(raw, piece.weight_type)

        shape = (stop - start - first, piece.n_cols)
        return Tensor(name, shape, piece.weight_type, make)

    def piece(self, name: str, ours: str, which: str, n_experts: int = 0) -> Tensor:
        """Gate, up or down of the bundles of a layer (of all its experts, one after another)."""
        plane = self._container.planes[ours]
        piece, n = plane.piece(which), plane.n_items // max(1, n_experts)
        stacked = (n_experts,) if n_experts else ()
        kind = WEIGHT_TYPES[piece.weight_type]

        def make() -> np.ndarray:
            reader = PlaneReader(plane, self._container)
            parts = []
            for start in range(0, plane.n_items, n):
                raw = reader.items(piece, start, start + n)
                if which == "down":
                    values = kind.decode(raw, piece.n_cols)
                    raw = kind.encode(np.ascontiguousarray(values.T))
                parts.append(blocks(raw, piece.weight_type))
            return np.concatenate(parts)

        shape = (piece.n_cols, n) if which == "down" else (n, piece.n_cols)
        return Tensor(name, (*stacked, *shape), piece.weight_type, make)

    def float32(self, name: str, values: np.ndarray) -> Tensor:
        return Tensor(name, values.shape, "f32", lambda: np.ascontiguousarray(values, np.float32))

    def decoded(self, ours: str) -> np.ndarray:
        plane = self._container.planes[ours]
        raw = PlaneReader(plane, self._container).items(plane.pieces[0], 0, plane.n_items)
        return WEIGHT_TYPES[plane.pieces[0].weight_type].decode(raw, plane.pieces[0].n_cols)


def blocks(raw: np.ndarray, weight_type: str) -> np.ndarray:
    """Our rows (all values, then all scales) as ggml's (scale and values, block by block)."""
    if weight_type not in ("int8", "int4"):
        return raw
    block = GROUP if weight_type == "int8" else GROUP // 2
    n = raw.shape[1] // (block + 2)
    values = raw[:, : n * block].reshape(len(raw), n, block)
    scales = raw[:, n * block :].reshape(len(raw), n, 2)
    return np.concatenate([scales, values], axis=2).reshape(len(raw), -1)


def tensors(config: ModelConfig, weights: Weights) -> Iterator[Tensor]:
    """All tensors under llama.cpp's names."""
    arch, _ = architecture(config)
    yield weights.rows("token_embd.weight", "embed")
    if config.family == "opt":
        yield weights.rows("position_embd.weight", "position", first=config.position_offset)
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}", f"blk.{i}"
        yield from _attention(config, weights, ours, theirs, arch)
        if config.family == "moe" and i in config.expert_layers:
            router = weights.decoded(f"{ours}.router")
            yield weights.float32(f"{theirs}.ffn_gate_inp.weight", router)
            for piece, name in PIECES.items():
                yield weights.piece(
                    f"{theirs}.{name}_exps.weight", f"{ours}.experts", piece, config.n_experts
                )
        else:
            yield from _ffn(config, weights, ours, theirs)
    yield from _norm(weights, "output_norm", "final_norm")
    if not config.tied:
        yield weights.rows("output.weight", "head")


def _attention(
    config: ModelConfig, weights: Weights, ours: str, theirs: str, arch: str
) -> Iterator[Tensor]:
    yield from _norm(weights, f"{theirs}.attn_norm", f"{ours}.attn_norm")
    if arch == "gpt2":
        yield weights.rows(f"{theirs}.attn_qkv.weight", f"{ours}.qkv")
        yield weights.float32(f"{theirs}.attn_qkv.bias", weights.vector(f"{ours}.qkv.bias"))
        yield weights.float32(f"{theirs}.attn_output.bias", weights.vector(f"{ours}.o.bias"))
    else:
        # llama and arcee rotate neighbouring values, the others halves of a head
        pairs = arch in ("llama", "arcee")
        heads = {"q": config.n_heads, "k": config.n_kv_heads, "v": 0}
        for part, n in heads.items():
            yield weights.rows(
                f"{theirs}.attn_{part}.weight", f"{ours}.qkv", part, heads=n if pairs else 0
            )
        if config.qkv_bias:
            bias = weights.vector(f"{ours}.qkv.bias")
            at = np.cumsum([config.n_heads, config.n_kv_heads]) * config.head_dim
            for part, values in zip("qkv", np.split(bias, at), strict=True):
                yield weights.float32(f"{theirs}.attn_{part}.bias", values)
        if config.qk_norm:
            for part in "qk":
                values = weights.vector(f"{ours}.{part}_norm.weight")
                yield weights.float32(f"{theirs}.attn_{part}_norm.weight", values)
    yield weights.rows(f"{theirs}.attn_output.weight", f"{ours}.o")
    yield from _norm(weights, f"{theirs}.ffn_norm", f"{ours}.ffn_norm")


def _ffn(config: ModelConfig, weights: Weights, ours: str, theirs: str) -> Iterator[Tensor]:
    deciding = "gate" if config.gated else "up"
    for piece in (("gate", "up", "down") if config.gated else ("up", "down")):
        name = f"{theirs}.{PIECES[piece]}.weight"
        if piece == deciding and weights.has_plane(f"{ours}.deciding"):
            yield weights.rows(name, f"{ours}.deciding")
        elif weights.has_plane(f"{ours}.down"):
            yield weights.rows(name, f"{ours}.{piece}")
        else:
            yield weights.piece(name, f"{ours}.ffn", piece)
    if config.family == "opt":
        up = "deciding" if config.sparse else "up"
        yield weights.float32(f"{theirs}.ffn_up.bias", weights.vector(f"{ours}.{up}.bias"))
        yield weights.float32(f"{theirs}.ffn_down.bias", weights.vector(f"{ours}.ffn.bias"))


def _norm(weights: Weights, theirs: str, ours: str) -> Iterator[Tensor]:
    for part in ("weight", "bias"):
        if weights.has_vector(f"{ours}.{part}"):
            yield weights.float32(f"{theirs}.{part}", weights.vector(f"{ours}.{part}"))


def write(model: Path, out: Path) -> str:
    """Writes `out`, one tensor in memory at a time; what differs from our model."""
    import gguf

    with open_container(model) as container:
        config = config_from_dict(container.family, container.config, path=model)
        arch, difference = architecture(config)
        writer = gguf.GGUFWriter(out, arch)
        _describe(writer, config, arch)
        found = list(tensors(config, Weights(container)))
        for tensor in found:
            kind = getattr(gguf.GGMLQuantizationType, GGML_NAMES[tensor.weight_type])
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.float32, tensor.n_bytes, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in found:
            writer.write_tensor_data(tensor.make())
        writer.close()
    return difference


def _describe(writer, config: ModelConfig, arch: str) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.n_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_tokenizer_model("no_vocab")
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.rope.n_rotated)
    writer.add_rope_freq_base(config.rope.theta)
    if config.family == "moe":
        writer.add_expert_count(config.n_experts)
        writer.add_expert_used_count(config.n_chosen)
        writer.add_expert_feed_forward_length(config.expert_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    print(write(args.model, args.out))


if __name__ == "__main__":
    main()
