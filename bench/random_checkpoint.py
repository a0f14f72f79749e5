"""A llama checkpoint of any size with random bf16 weights, written piece by piece.

    python bench/random_checkpoint.py OUT_DIR --hidden 2048 --intermediate 8192 --layers 32

For measuring conversion under a memory cap; the weights are drawn from a small table, so that
writing is not slower than the disk.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import numpy as np

VOCAB, HEAD_DIM, KV_SHARE = 32000, 64, 4


def tensors(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    h, n = args.hidden, args.intermediate
    kv = h // KV_SHARE
    shapes = {"model.embed_tokens.weight": (VOCAB, h), "model.norm.weight": (h,)}
    for i in range(args.layers):
        prefix = f"model.layers.{i}."
        shapes |= {
            prefix + "input_layernorm.weight": (h,),
            prefix + "post_attention_layernorm.weight": (h,),
            prefix + "self_attn.q_proj.weight": (h, h),
            prefix + "self_attn.k_proj.weight": (kv, h),
            prefix + "self_attn.v_proj.weight": (kv, h),
            prefix + "self_attn.o_proj.weight": (h, h),
            prefix + "mlp.gate_proj.weight": (n, h),
            prefix + "mlp.up_proj.weight": (n, h),
            prefix + "mlp.down_proj.weight": (h, n),
        }
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--activation", default="relu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": args.hidden,
        "intermediate_size": args.intermediate, "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // HEAD_DIM,
        "num_key_value_heads": args.hidden // HEAD_DIM // KV_SHARE, "vocab_size": VOCAB,
        "hidden_act": args.activation, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (args.out / "config.json").write_text(json.dumps(config))
    shapes = tensors(args)
    header, offset = {}, 0
    for name, shape in shapes.items():
        n_bytes = 2 * int(np.prod(shape))
        header[name] = {
            "dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + n_bytes],
        }  # fmt: skip
        offset += n_bytes
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    values = rng.standard_normal(2**22, dtype=np.float32) * np.float32(0.02)
    table = (values.view(np.uint32) >> 16).astype(np.uint16)  # bf16 by cutting: good enough here
    with open(args.out / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                start = int(rng.integers(0, table.size // 2))
                part = table[start : start + min(left, table.size // 2)]
                file.write(part.tobytes())
                left -= part.size
    print(f"{args.out}: {offset / 2**30:.2f} GiB of weights")


if __name__ == "__main__":
    main()
