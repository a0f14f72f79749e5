"""What runs inside a limit: one engine, one kind of work, one line of JSON at the end.

`python -m flashllm.stress.child '{"work": …}'`; see reporting.py.  Lines before the last announce
what the watcher outside must know.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from typing import Any

import numpy as np

from ..api import LLM
from ..errors import BudgetError, ContextLengthError
from ..probe.process import group_charge, process_memory
from .reporting import run_engine, say

SAMPLING = {"temperature": 1.0, "seed": 1, "ignore_eos": True}
LEAST_TOKENS = 8
PROMPT_TOKENS = 2  # of each of many short prompts: what requests leave behind is looked for


def work(llm: LLM, spec: dict[str, Any]) -> dict[str, Any]:
    say({"event": "planned"})
    report = WORKS[spec["work"]](llm, spec)
    return {**report, "flash": llm.live(), "peak_rss": process_memory().peak_rss}


def short_prompt(llm: LLM, number: int = 0) -> list[int]:
    """Eight token ids that depend on the vocabulary and the number only."""
    return np.random.default_rng(number).integers(3, llm.vocab_size, 8).tolist()


def _stream(llm: LLM, spec: dict) -> dict:
    """Tokens until the time or the count is up, at least LEAST_TOKENS; resized half-way if the
    spec says so."""
    tokens, times, resized = [], [], None
    stream = llm.stream(short_prompt(llm), max_tokens=spec["tokens"], **SAMPLING)
    for delta in stream:
        tokens += delta.tokens
        times.append(time.monotonic())
        enough = len(tokens) >= max(LEAST_TOKENS, 1) and times[-1] - times[0] > spec["seconds"]
        if "resize" in spec and resized is None and (len(tokens) >= 4 or enough):
            resized = _lower(llm, spec["resize"])
            say({"event": "resized", "ram_budget": resized})
        elif enough:
            break
    stream.close()
    spent = times[len(tokens) - 1] - times[0] if len(tokens) > 1 else 0.0
    return {"tokens": tokens, "tokens_per_s": (len(tokens) - 1) / spent if spent else None,
            "ram_budget": llm.ram_budget}  # fmt: skip


def _lower(llm: LLM, wanted: int) -> int:
    """Resize to `wanted`, or to the floor of the open engine where that is higher."""
    try:
        llm.resize(wanted)
    except BudgetError as error:
        llm.resize(error.floor_bytes)
    return llm.ram_budget


def _long_context(llm: LLM, spec: dict) -> dict:
    """Fill the context to its last token; one more must be refused, not computed."""
    n_prompt = llm.n_context - LEAST_TOKENS
    ids = np.random.default_rng(7).integers(3, llm.vocab_size, llm.n_context + 1).tolist()
    result = llm.generate(ids[:n_prompt], max_tokens=LEAST_TOKENS, **SAMPLING)
    refused = False
    try:
        llm.generate(ids, max_tokens=1)
    except ContextLengthError:
        refused = True
    return {"tokens": result.tokens, "overlong_refused": refused,
            "tokens_per_s": result.timings["prompt_per_second"]}  # fmt: skip


def _prompts(llm: LLM, spec: dict) -> dict:
    """Many short prompts: all their tokens as one digest, and what memory grew by after a tenth."""
    digest, n_tokens, early = hashlib.sha256(), 0, 0
    started = time.monotonic()
    for number in range(spec["prompts"]):
        result = llm.generate(short_prompt(llm, number), max_tokens=PROMPT_TOKENS, **SAMPLING)
        digest.update(np.array(result.tokens, np.int32).tobytes())
        n_tokens += len(result.tokens)
        if number == spec["prompts"] // 10:
            early = process_memory().rss
    return {"digest": digest.hexdigest(), "growth": process_memory().rss - early,
            "tokens_per_s": n_tokens / (time.monotonic() - started)}  # fmt: skip


N_BINS = 20  # of a soak's time, over which memory and speed are told


def _soak(llm: LLM, spec: dict) -> dict:
    """The same requests for `soak` seconds, left in every way there is, and the budget lowered and
    raised in between.  Tokens, descriptors and threads are those of the first round; memory and
    speed are told for every twentieth of the time."""
    budget, first, n_rounds = llm.ram_budget, None, 0
    bins = [{"rss": 0, "anon": 0, "charge": 0, "tokens": 0, "seconds": 0.0, "cpu_s": 0.0}
            for _ in range(N_BINS)]  # fmt: skip
    changed = set()
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < spec["soak"] or n_rounds < N_BINS:
        digest, here = hashlib.sha256(), bins[min(N_BINS - 1, int(N_BINS * elapsed / spec["soak"]))]
        begun, cpu = time.monotonic(), time.process_time()
        for number in range(4):
            result = llm.generate(short_prompt(llm, number), max_tokens=LEAST_TOKENS, **SAMPLING)
            digest.update(np.array(result.tokens, np.int32).tobytes())
            here["tokens"] += len(result.tokens)
        here["seconds"] += time.monotonic() - begun
        here["cpu_s"] += time.process_time() - cpu
        state = llm.save_state()
        stream = llm.stream(short_prompt(llm), state=state, max_tokens=LEAST_TOKENS, **SAMPLING)
        next(stream)
        stream.close()
        try:
            llm.generate([3] * (llm.n_context + 1), max_tokens=1)
        except ContextLengthError:
            digest.update(b"refused")
        _lower(llm, 1)
        llm.resize(budget)
        # The first round loads what is loaded late: it is no standard for memory or threads.
        facts = {"tokens": digest.hexdigest(), "descriptors": len(os.listdir("/proc/self/fd")),
                 "threads": threading.active_count()}  # fmt: skip
        first = first if n_rounds > 1 else facts
        changed |= {name for name, value in facts.items() if value != first[name]}
        memory, charge = process_memory(), group_charge()
        for name, value in (("rss", memory.rss), ("anon", memory.rss_anon),
                            ("charge", charge.usage if charge else 0)):  # fmt: skip
            here[name] = max(here[name], value)
        n_rounds += 1
    return {"bins": bins, "rounds": n_rounds, "changed": sorted(changed)}


WORKS = {"stream": _stream, "long context": _long_context, "prompts": _prompts, "soak": _soak}

if __name__ == "__main__":
    sys.exit(run_engine(sys.argv[1], work))
