"""An OLMoE checkpoint with random bf16 weights whose routing repeats itself, or does not.

    python bench/random_olmoe.py OUT_DIR --layers 16 --hidden 2048 --experts 64 --chosen 8

Which of both depends on the prompt.  The vocabulary has two halves; every embedding is noise plus
the sign vector of its half, which is the slow component of the residual: with a share `--slow` of
its variance.  Routers see the second half's vector as any other input and are orthogonal to the
first half's.  So ids of the first half are routed by their noise alone, at chance (8 of 64 picks
in 8 recur), and ids of the second half by a preference common to all tokens, and their noise: 0.65
makes 45 % of a token's picks those of the token before, as in trained models, where the preference
drifts with the text; here it stays for the whole run, which favours a cache that keeps what is
often used.  The head keeps a greedy run in the half of its prompt.  Attention and experts add
little to the residual, so that a token stays what routes it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from random_checkpoint import Table, bf16, write

from flashllm.models.configs import config_from_hf

BLOCK = 1024  # rows of the large matrices that are made at once
PULL = 20.0  # how many logits the head gives to tokens of the same half


def config_of(args: argparse.Namespace) -> dict:
    return {
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "hidden_size": args.hidden,
        "intermediate_size": args.intermediate, "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 128, "num_key_value_heads": args.hidden // 128,
        "num_experts": args.experts, "num_experts_per_tok": args.chosen, "norm_topk_prob": False,
        "vocab_size": args.vocab, "eos_token_id": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
    }  # fmt: skip


def signs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two orthogonal vectors of +1 and -1."""
    first = rng.choice(np.float32([-1, 1]), n)
    second = first.copy()
    second[rng.permutation(n)[: n // 2]] *= -1
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--slow", type=float, default=0.65)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    raw = config_of(args)
    (args.out / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(0)
    table, h = Table(rng), args.hidden
    blind, seen = signs(rng, h)  # of the first half, of the second half

    def without(rows: np.ndarray, *vectors: np.ndarray) -> np.ndarray:
        for vector in vectors:
            rows = rows - np.outer(rows @ vector, vector) / h
        return rows

    def of_vocabulary(noise: float, pull: float) -> Iterator[np.ndarray]:
        for start in range(0, args.vocab, BLOCK):
            ids = np.arange(start, min(start + BLOCK, args.vocab))
            rows = rng.standard_normal((ids.size, h), dtype=np.float32) * np.float32(noise)
            rows = without(rows, blind, seen)  # or some tokens would follow any other
            rows += np.float32(pull) * np.where((ids < args.vocab // 2)[:, None], blind, seen)
            yield bf16(rows)

    def values(name: str) -> Iterator[np.ndarray]:
        shape = shapes[name]
        if name == "model.embed_tokens.weight":
            return of_vocabulary((1 - args.slow) ** 0.5, args.slow**0.5)
        if name == "lm_head.weight":
            return of_vocabulary(2 * h**-0.5, PULL / h)
        if name.endswith("mlp.gate.weight"):
            rows = rng.standard_normal(shape, dtype=np.float32) * np.float32(h**-0.5)
            return iter([bf16(without(rows, blind))])
        if len(shape) == 1:
            return table.parts(shape[0], 1.0, 0.05)
        small = {"o_proj.weight": 0.05, "down_proj.weight": 0.1}
        scale = next((s for ending, s in small.items() if name.endswith(ending)), 1.0)
        return table.parts(int(np.prod(shape)), 0.0, scale * shape[-1] ** -0.5)

    roles = config_from_hf(raw).roles()
    found = [tensor for plane in roles.planes for _, tensor in plane.tensors]
    found += [tensor for vector in roles.vectors for tensor in vector.parts]
    shapes = {tensor.names[0]: tensor.shape for tensor in found}
    write(args.out / "model.safetensors", shapes, values)


if __name__ == "__main__":
    main()
