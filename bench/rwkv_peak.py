"""Peak memory of a recurrent model after a short and after a long text, as prompt and as answer.

    python bench/rwkv_peak.py MODEL.flash --tokens 100,10000 --budget 96MiB

A process of its own for every number, which is its VmHWM at the end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from flashllm.units import MIB, parse_size

CHILD = """
import sys
from flashllm import LLM
from flashllm.probe.process import process_memory
path, n, how, budget = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with LLM(path, ram_budget=budget, prefill_chunk=64) as llm:
    prompt = [7 * i % llm.vocab_size for i in range(n if how == "prompt" else 3)]
    n_new = n if how == "answer" else 2
    result = llm.generate(prompt, max_tokens=n_new, temperature=0.0, ignore_eos=True)
    assert len(result.tokens) == n_new
print(process_memory().peak_rss)
"""


def peak(path: Path, n_tokens: int, how: str, budget: int) -> int:
    """VmHWM in bytes of a process that took in ("prompt") or wrote ("answer") so many tokens."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(n_tokens), how, str(budget)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", default="100,10000")
    parser.add_argument("--budget", default="96MiB")
    args = parser.parse_args()
    budget = parse_size(args.budget, whole_bytes=args.model.stat().st_size)
    print("| text | tokens | peak RSS MiB |\n| --- | --- | --- |")
    for how in ("prompt", "answer"):
        for n in map(int, args.tokens.split(",")):
            print(f"| {how} | {n} | {peak(args.model, n, how, budget) / MIB:.2f} |", flush=True)


if __name__ == "__main__":
    main()
