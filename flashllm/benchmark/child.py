"""What runs on one rung: one engine, prompts and completions timed, a line of JSON for each.

`python -m flashllm.benchmark.child '{"model": …}'`; see stress/reporting.py.  Token ids are random
and seeded by the repetition, and completions are sampled with the same seed, so that every cap is
asked for the same work and must say the same.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import numpy as np

from ..api import LLM
from ..engine.results import Result
from ..stress.reporting import run_engine, say

TG_PROMPT = 8  # tokens before a completion; llama-bench begins with one
WARM_UP = 4


def work(llm: LLM, spec: dict[str, Any]) -> dict[str, Any]:
    say({"event": "planned", **_facts(llm)})
    _warm_up(llm)
    for kind, n in spec["tests"]:
        for repetition in range(spec["repetitions"]):
            run = _prompt if kind == "pp" else _completion
            say({"event": "run", "kind": kind, "asked": n, **run(llm, n, repetition)})
    return {"event": "done", **llm.memory.peaks()}


def _facts(llm: LLM) -> dict[str, Any]:
    """What was chosen, for the table's columns."""
    planes = llm.container.planes.values()
    matrices = sum(plane.n_items * sum(p.n_cols for p in plane.pieces) for plane in planes)
    vectors = sum(int(np.prod(shape)) for shape, *_ in llm.container.vectors.values())
    largest = max(planes, key=lambda plane: plane.n_items * plane.stride)
    return {
        "family": llm.container.family, "weight_type": largest.pieces[-1].weight_type,
        "parameters": matrices + vectors, "file_bytes": llm.container.size,
        "digest": llm.container.digest, "kernels": llm.kernels.name,
        "n_threads": llm.kernels.n_threads, "storage": llm.choice.name,
        "io_engine": llm.io_engine,
        "ram_budget": llm.ram_budget, "n_context": llm.n_context, "load_ms": llm.load_ms,
        "kept_bytes": sum(view.nbytes for view in llm.store.memory()), "mode": llm.mode,
        "streamed_bytes": llm.plan.streamed_bytes,
        "device_bytes_per_s": llm.choice.curve.sequential_bytes_per_s,
        "curve": llm.choice.curve.name,
    }  # fmt: skip


def _ids(llm: LLM, n: int, repetition: int) -> list[int]:
    return np.random.default_rng(repetition).integers(3, llm.vocab_size, n).tolist()


def _warm_up(llm: LLM) -> None:
    """A few tokens that are not counted: first-touch costs are not a speed."""
    n = min(WARM_UP, llm.n_context // 2)
    llm.generate(_ids(llm, n, 1 << 20), max_tokens=n, ignore_eos=True, temperature=0)


def _prompt(llm: LLM, n: int, repetition: int) -> dict[str, Any]:
    n = min(n, llm.n_context - 1)
    result = llm.generate(_ids(llm, n, repetition), max_tokens=1, ignore_eos=True, temperature=0)
    timings, flash = result.timings, result.flash
    return {
        "n": n,
        "tokens_per_s": timings["prompt_per_second"],
        "bytes_per_token": flash["bytes_read"] / n,
        "reads_per_token": flash["reads"] / n,
        "hit_rate": flash["hit_rate"],
        "stall": flash["stall_ms"] / timings["prompt_ms"],
        "floor_ms": {name: ms / n for name, ms in flash["prompt_floor_ms"].items()},
        "time_over_floor": flash["prompt_time_over_floor"],
        "said": _digest(result),
    }


def _completion(llm: LLM, n: int, repetition: int) -> dict[str, Any]:
    n_prompt = min(TG_PROMPT, max(1, llm.n_context // 2))
    n = min(n, llm.n_context - n_prompt - 1)
    result = llm.generate(
        _ids(llm, n_prompt, repetition), max_tokens=n + 1, ignore_eos=True, temperature=1.0,
        seed=repetition,
    )  # fmt: skip
    timings, flash = result.timings, result.flash
    parts = timings["per_token_ms"]
    return {
        "n": n,
        "tokens_per_s": timings["predicted_per_second"],
        "bytes_per_token": flash["bytes_per_token"],
        "reads_per_token": flash["reads_per_token"],
        "hit_rate": flash["hit_rate"],
        "stall": (parts["wait"] + parts["decode"]) / sum(parts.values()),
        "per_token_ms": parts,
        "floor_ms": flash["floor_ms"],
        "time_over_floor": flash["time_over_floor"],
        "density": flash["density"],
        "recall": flash["recall"],
        "said": _digest(result),
    }


def _digest(result: Result) -> str:
    return hashlib.sha256(np.array(result.tokens, np.int32).tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(run_engine(sys.argv[1], work))
