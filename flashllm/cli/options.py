"""Arguments that several verbs share: the engine's settings and the prompt."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from ..errors import UsageError

ENGINE_FLAGS = (
    ("--ram-budget", "B", str, "what the process may use: 512MiB, 50%% of the file, bytes"),
    ("--storage", "NAME", str, "auto, direct, pread or mmap"),
    ("--kernels", "NAME", str, "kernel set: auto, reference, serial, avx2, avx512, neon"),
    ("--num-threads", "N", int, "compute threads"),
    ("--n-context", "N", int, "most tokens of one sequence"),
    ("--kv-type", "T", str, "auto, f32 or f16"),
    ("--prefill-chunk", "N", int, "prompt tokens that share a pass over the weights"),
    ("--io-depth", "N", int, "reads in flight"),
    ("--io-engine", "NAME", str, "who waits for the device: threads or uring"),
    ("--mode", "NAME", str, "exact, or approx: decode with predicted neurons only"),
    ("--recall", "R", float, "approx: share of the active neurons to be predicted, such as 0.99"),
    ("--density", "D", float, "approx, models without exact zeros: share of neurons to compute"),
    ("--audit", "N", int, "approx: measure recall on every N-th token; 0 never"),
    ("--speculate", "N|off|auto", str, "draft tokens from the text, verify them in one pass"),
    ("--policy", "NAME", str, "eviction policy of the bundle cache: lru, lfu, window"),
)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine (each has an environment twin FLASHLLM_…)")
    for flag, metavar, kind, text in ENGINE_FLAGS:
        group.add_argument(flag, metavar=metavar, type=kind, help=text)
    group.add_argument("--no-pin", action="store_true", help="keep nothing in memory (naive mode)")
    group.add_argument("--governor", action="store_true", default=None,
                       help="give memory back under memory pressure, take it again slowly")
    group.add_argument("--debug", action="store_true", default=None, help="check every invariant")


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for LLM(...)."""
    named = {flag[2:].replace("-", "_") for flag, *_ in ENGINE_FLAGS} | {"debug", "governor"}
    return {name: getattr(args, name) for name in named} | {"pin": not args.no_pin}


def whole(low: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `low` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= (n := int(text)) < 2**62:
            raise argparse.ArgumentTypeError(f"a whole number from {low} on, not {text[:40]!r}")
        return n

    return parse


def seconds(text: str) -> float:
    """An argparse type: some time, at most a year."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < 366 * 86400:
        raise argparse.ArgumentTypeError(f"a number of seconds above 0, not {text[:40]!r}")
    return found


def token_ids(text: str) -> list[int]:
    """`1,2,3` as ids; UsageError says what is not a number."""
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"--token-ids takes numbers such as 1,2,3: {error}") from None
