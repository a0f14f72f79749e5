"""A checkpoint through accelerate's disk offload or through AirLLM: one JSON line.

    PYTHON_WITH_TORCH bench/peers/offload_child.py DIR --with accelerate --prompt 1,5 --tokens 4

Needs nothing of this project.  accelerate keeps in memory what fits in a third of the cap (bf16
layers are converted and copied on their way, and a larger share is killed), the rest on disk.
"""

from __future__ import annotations

import argparse
import json
import time

import torch


def accelerated(args: argparse.Namespace):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=torch.bfloat16, device_map="auto", max_memory={"cpu": args.cap // 3},
        offload_folder=args.folder + "/offload",
    )  # fmt: skip


def airllm(args: argparse.Namespace):
    from airllm import AirLLMBaseModel

    class WithoutTokenizer(AirLLMBaseModel):
        def get_tokenizer(self, *args, **kwargs):
            return None

    return WithoutTokenizer(args.folder, device="cpu", dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--with", dest="using", choices=("accelerate", "airllm"), default="airllm")
    parser.add_argument("--split", action="store_true", help="only make AirLLM's files")
    parser.add_argument("--prompt", default="1")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cap", type=int, default=2**40)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    with torch.inference_mode():
        model = airllm(args) if args.using == "airllm" else accelerated(args)
        if args.split:
            return
        loaded = time.perf_counter()
        prompt = [int(word) for word in args.prompt.split(",")]
        out = model(input_ids=torch.tensor([prompt]), use_cache=True)
        tokens, prefilled, read = [int(out.logits[0, -1].argmax())], time.perf_counter(), read_now()
        while len(tokens) < args.tokens:
            out = model(
                input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values,
                use_cache=True,
            )  # fmt: skip
            tokens.append(int(out.logits[0, -1].argmax()))
        ended = time.perf_counter()
    print(json.dumps({
        "load_s": loaded - started,
        "prefill_tokens_per_s": len(prompt) / (prefilled - loaded),
        "tokens_per_s": (len(tokens) - 1) / (ended - prefilled),
        "decode_bytes_per_token": (read_now() - read) / max(1, len(tokens) - 1),
        "tokens": tokens,
    }))  # fmt: skip


def read_now() -> int:
    """Bytes that the kernel fetched from the device for this process."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


if __name__ == "__main__":
    main()
