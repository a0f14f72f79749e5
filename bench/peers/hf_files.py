"""A container as a Hugging Face checkpoint in bf16, for peers that stream those.

    python bench/peers/hf_files.py MODEL.flash OUT_DIR

bf16 is the narrowest type that they run on a CPU, so they move nearly twice our bytes; the card
says so.  Transformers wants a hidden size that is a multiple of the heads: where an inflated model
has another, neighbouring heads are joined (transformers_in_memory.py), which keeps every matrix's
size and changes the text; the difference is printed.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers_in_memory import merged_heads  # noqa: E402

from flashllm.checkpoints import widen  # noqa: E402
from flashllm.conversion.from_container import ContainerCheckpoint  # noqa: E402
from flashllm.errors import UnsupportedError  # noqa: E402
from flashllm.models.configs import config_from_dict  # noqa: E402
from flashllm.quant import WEIGHT_TYPES  # noqa: E402

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "arcee": "ArceeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
}  # fmt: skip
ROWS_PER_BLOCK = 4096


def hf_config(config) -> tuple[dict, str]:
    """(config.json, what differs from our model or nothing)."""
    model_type, activation, note = config.model_type, config.activation, ""
    if config.family == "llama" and not config.gated:
        model_type = "arcee"
    if config.family not in ("llama", "moe") or model_type not in ARCHITECTURES:
        raise UnsupportedError(f"HF checkpoint: not written for {config.family} {model_type}")
    merge = 1 if config.family == "moe" else merged_heads(config.to_dict())
    if merge > 1:
        note = f"{merge} heads joined into one"
    values = {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads // merge,
        "num_key_value_heads": config.n_kv_heads // merge,
        "head_dim": config.head_dim * merge,
        "hidden_act": activation,
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.n_context,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.family == "moe":
        values |= {
            "num_experts": config.n_experts,
            "num_experts_per_tok": config.n_chosen,
            "moe_intermediate_size": config.expert_size,
            "norm_topk_prob": config.normalise,
        }
    return values, note


def write(model: Path, folder: Path) -> str:
    """Writes config.json and one safetensors file, some rows at a time; the difference."""
    with ContainerCheckpoint(model) as source:
        family, raw = source.normalised
        values, note = hf_config(config_from_dict(family, raw, path=model))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(values))
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name in source.names():
            n_bytes = 2 * int(np.prod(source.shape(name)))
            header[name] = {
                "dtype": "BF16", "shape": list(source.shape(name)),
                "data_offsets": [offset, offset + n_bytes],
            }  # fmt: skip
            offset += n_bytes
        text = json.dumps(header).encode()
        with open(folder / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in source.names():
                for values in _values(source, name):
                    file.write(WEIGHT_TYPES["bf16"].encode(values.reshape(1, -1)).tobytes())
    return note


def _values(source: ContainerCheckpoint, name: str):
    """float32 blocks of rows; a matrix that is stored by columns comes as a whole."""
    shape = source.shape(name)
    if len(shape) == 2:
        columns = source.columns(name, 0, shape[1])
        if columns is not None:
            yield np.ascontiguousarray(widen(columns, source.dtype(name)).T)
            return
    for start in range(0, shape[0], ROWS_PER_BLOCK):
        yield source.rows(name, start, min(start + ROWS_PER_BLOCK, shape[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    print(write(args.model, args.out))


if __name__ == "__main__":
    main()
