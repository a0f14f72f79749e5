"""A checkpoint of any family and size with random bf16 weights, written piece by piece.

    python bench/random_checkpoint.py OUT_DIR --family opt --hidden 2048 --layers 22

For measuring conversion and the cap at full size; weights are drawn from a small table, so that
writing is not slower than the disk.  A ReLU model's deciding biases lie `--threshold` below zero in
units of its pre-activations' deviation, where the family has such biases: 1 leaves about one neuron
in six active, as trained models do (1.28: 10 %, 1.64: 5 %); without them half of all are.

With `--fresh` a token's hidden state stays near its own embedding (deviation 1, and what layers add
is divided by sqrt(2 layers)), so that tokens share no more neurons or experts than chance gives:
the worst case for a cache.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flashllm.models.base import ModelConfig, TensorRole  # noqa: E402
from flashllm.models.configs import config_from_hf  # noqa: E402

VOCAB, HEAD_DIM, KV_SHARE, DEVIATION = 32000, 64, 4, 0.02


def common(args: argparse.Namespace) -> dict[str, Any]:
    heads = args.hidden // HEAD_DIM
    return {
        "hidden_size": args.hidden, "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // KV_SHARE), "vocab_size": VOCAB, "eos_token_id": 2,
        "hidden_act": args.activation, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
    }  # fmt: skip


def experts(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_experts": args.experts, "num_local_experts": args.experts,
        "num_experts_per_tok": args.chosen, "moe_intermediate_size": args.intermediate,
    }  # fmt: skip


# What a config of each family says beyond `common`, in the checkpoints' own keys.
FAMILIES = {
    "llama": lambda args: {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "mistral": lambda args: {"model_type": "mistral", "sliding_window": 512},
    "qwen2": lambda args: {"model_type": "qwen2"},
    "qwen3": lambda args: {"model_type": "qwen3", "head_dim": HEAD_DIM},
    "gpt2": lambda args: {
        "model_type": "gpt2", "n_embd": args.hidden, "n_layer": args.layers, "n_positions": 2048,
        "n_head": args.hidden // HEAD_DIM, "n_inner": args.intermediate,
        "activation_function": args.activation,
    },
    "opt": lambda args: {
        "model_type": "opt", "ffn_dim": args.intermediate, "activation_function": args.activation,
    },
    "gpt_neox": lambda args: {"model_type": "gpt_neox"},
    "falcon": lambda args: {
        "model_type": "falcon", "new_decoder_architecture": True, "bias": True,
        "num_kv_heads": max(1, args.hidden // HEAD_DIM // KV_SHARE), "activation": args.activation,
        "ffn_hidden_size": args.intermediate,
    },
    "gemma2": lambda args: {
        "model_type": "gemma2", "head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM,
        "hidden_activation": args.activation, "sliding_window": 512,
    },
    "gemma": lambda args: {
        "model_type": "gemma", "head_dim": HEAD_DIM, "hidden_activation": args.activation,
    },
    "granite": lambda args: {
        "model_type": "granite", "attention_multiplier": HEAD_DIM**-0.5, "logits_scaling": 8.0,
        "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
    },
    "gemma3": lambda args: {
        "model_type": "gemma3_text", "head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM,
        "hidden_activation": args.activation, "sliding_window": 512,
    },
    "phi3": lambda args: {"model_type": "phi3"},
    "arcee": lambda args: {"model_type": "arcee"},
    "nemotron": lambda args: {"model_type": "nemotron"},
    "olmoe": lambda args: {"model_type": "olmoe", **experts(args)},
    "mixtral": lambda args: {"model_type": "mixtral", **experts(args)},
    "qwen2_moe": lambda args: {
        "model_type": "qwen2_moe", "shared_expert_intermediate_size": 2 * args.intermediate,
        **experts(args),
    },
    "qwen3_moe": lambda args: {"model_type": "qwen3_moe", "head_dim": HEAD_DIM, **experts(args)},
    "deepseek_v2": lambda args: {
        "model_type": "deepseek_v2", "q_lora_rank": None, "kv_lora_rank": 256,
        "qk_rope_head_dim": 32, "qk_nope_head_dim": HEAD_DIM, "v_head_dim": HEAD_DIM,
        "n_routed_experts": args.experts, "n_shared_experts": 2, "first_k_dense_replace": 1,
        **experts(args),
    },
}  # fmt: skip


def tensors(
    config: ModelConfig, threshold: float, fresh: bool
) -> Iterator[tuple[TensorRole, float, float]]:
    """(tensor, centre, deviation) of every tensor, under the first of its names."""
    stored_less_one = config.family in ("gemma", "nemotron")
    roles = config.roles()
    added = DEVIATION / (2 * config.n_layers) ** 0.5
    for plane in roles.planes:
        for name, tensor in plane.tensors:
            deviation = DEVIATION
            if fresh:
                deviation = 1.0 if plane.name == "embed" else deviation
                deviation = added if name == "down" or plane.name.endswith(".o") else deviation
            yield tensor, 0.0, deviation
    for vector in roles.vectors:
        centre = 1.0 if vector.name.endswith("norm.weight") and not stored_less_one else 0.0
        if vector.name.endswith("deciding.bias"):
            centre = -threshold * DEVIATION * config.hidden_size**0.5
        for part in vector.parts:
            yield part, centre, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192, help="of each expert, if any")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--threshold", type=float, default=1.0)
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    raw = common(args) | FAMILIES[args.family](args)
    (args.out / "config.json").write_text(json.dumps(raw))
    config = config_from_hf(raw)
    laws = tensors(config, args.threshold, args.fresh)
    listed = {tensor.names[0]: (tensor.shape, *law) for tensor, *law in laws}
    rng = np.random.default_rng(0)
    table = Table(rng)

    def values(name: str) -> Iterator[np.ndarray]:
        shape, centre, deviation = listed[name]
        return table.parts(int(np.prod(shape)), centre, deviation)

    shapes = {name: shape for name, (shape, *_) in listed.items()}
    write(args.out / "model.safetensors", shapes, values)


class Table:
    """Normal deviates that all weights are cut from, at random places: writing is then not slower
    than the disk."""

    def __init__(self, rng: np.random.Generator, size: int = 2**22):
        self._rng, self._normal = rng, rng.standard_normal(size, dtype=np.float32)
        self._scaled: dict[tuple[float, float], np.ndarray] = {}

    def parts(self, n_values: int, centre: float, deviation: float) -> Iterator[np.ndarray]:
        """bf16 bits of `n_values` values, piece by piece."""
        if (centre, deviation) not in self._scaled:
            self._scaled[centre, deviation] = bf16(centre + self._normal * np.float32(deviation))
        table = self._scaled[centre, deviation]
        while n_values:
            start = int(self._rng.integers(0, table.size // 2))
            part = table[start : start + min(n_values, table.size // 2)]
            yield part
            n_values -= part.size


def bf16(values: np.ndarray) -> np.ndarray:
    """Bits by cutting: good enough here."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write(
    path: Path, shapes: dict[str, tuple[int, ...]], values: Callable[[str], Iterator[np.ndarray]]
) -> None:
    """A safetensors file of bf16 tensors; `values(name)` gives a tensor's bits piece by piece."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        n_bytes = 2 * int(np.prod(shape))
        header[name] = {
            "dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + n_bytes],
        }  # fmt: skip
        offset += n_bytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            for part in values(name):
                file.write(part.tobytes())
    print(f"{path}: {offset / 2**30:.2f} GiB of weights")


if __name__ == "__main__":
    main()
