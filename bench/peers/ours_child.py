"""One prompt and one decode with flashllm, timed as the peers' children are; one JSON line."""

from __future__ import annotations

import argparse
import json
import time

from flashllm import LLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    args = parser.parse_args()
    prompt = [int(word) for word in args.prompt.split(",")]
    started = time.perf_counter()
    with LLM(args.model, **args.settings) as llm:
        loaded, read, known, result = time.perf_counter(), [], [], None
        for delta in llm.stream(prompt, max_tokens=args.tokens, temperature=0.0, ignore_eos=True):
            read.append(bytes_read())
            known.append(len(delta.tokens))  # half a character's tokens wait for the other half
            result = delta.result or result
    decode_s = result.timings["predicted_ms"] / 1e3
    print(json.dumps({
        "load_s": loaded - started,
        "prefill_tokens_per_s": result.timings["prompt_per_second"],
        "tokens_per_s": (len(result.tokens) - 1) / decode_s,
        "decode_bytes_per_token": (read[-1] - read[0]) / max(1, sum(known[1:])),
        "tokens": result.tokens,
        "flash": result.flash,
    }))  # fmt: skip


def bytes_read() -> int:
    """Bytes that the kernel fetched from the device for this process, direct reads included."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


if __name__ == "__main__":
    main()
