"""Decode speed of Hugging Face transformers with every weight in memory, same shape and threads.

    PYTHON_WITH_TORCH bench/transformers_in_memory.py --shape shape.json --repeats 3 --tokens 16

`shape.json` is `flashllm inspect MODEL --json`.  Weights are random (speed does not depend on them)
and bfloat16, the widest type that people would run on a CPU; the figures are for a comparison in
memory, and no cap is set.  Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time


def build(config: dict, dtype):
    """A LlamaForCausalLM of this shape, built one layer at a time by transformers itself."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    merge = merged_heads(config)
    made = LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"] // merge,
        num_key_value_heads=config["n_kv_heads"] // merge,
        head_dim=config["head_dim"] * merge,
        hidden_act={"relu2": "relu2"}.get(config["activation"], config["activation"]),
        tie_word_embeddings=config["tied"],
        max_position_embeddings=config["n_context"],
    )
    torch.set_default_dtype(dtype)
    with torch.inference_mode():
        model = LlamaForCausalLM(made).eval()
    return model


def merged_heads(config: dict) -> int:
    """How many heads to join into one: transformers wants hidden_size to be a multiple of the
    heads, which inflated models need not have; the matrices keep their sizes."""
    return next(
        m for m in range(1, config["n_kv_heads"] + 1)
        if config["n_kv_heads"] % m == 0 and config["hidden_size"] % (config["n_heads"] // m) == 0
    )


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with open(args.shape) as file:
        config = json.load(file)["config"]
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    model = build(config, torch.bfloat16)
    ids = torch.tensor([[1, 5, 9, 20, 33, 7, 42, 11]])
    speeds = []
    with torch.inference_mode():
        for _ in range(args.repeats + 1):
            out = model(ids, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            for _ in range(args.tokens):
                out = model(token, past_key_values=cache, use_cache=True)
                cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            speeds.append(args.tokens / (time.perf_counter() - started))
    n_parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({
        "tokens_per_s": statistics.median(speeds[1:]), "all": speeds, "parameters": n_parameters,
        "dtype": "bfloat16", "threads": args.threads,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
