"""`flashllm bench MODEL`: llama-bench's table under RAM caps, each cap in a fresh process."""

from __future__ import annotations

import argparse
import sys

from .. import assembly
from ..benchmark.child import TG_PROMPT
from ..benchmark.ladder import climb
from ..benchmark.machine import about_machine
from ..benchmark.table import as_csv, as_json, markdown
from ..container import open_container
from ..errors import UsageError
from .options import add_engine_flags, engine_arguments

FORMATS = {"md": markdown, "csv": as_csv, "json": as_json}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a .flash container")
    parser.add_argument("-p", "--n-prompt", default="512", metavar="N,…",
                        help="prompts of so many tokens (0: none)")
    parser.add_argument("-n", "--n-gen", default="128", metavar="N,…",
                        help="completions of so many tokens (0: none)")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-o", "--output", choices=list(FORMATS), default="md")
    parser.add_argument("--cap", metavar="B,…", help="caps to try, such as 100%%,50%%,512MiB; "
                        "default: --ram-budget, or what this machine leaves")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    tests = [("pp", n) for n in _counts(args.n_prompt, "-p")]
    tests += [("tg", n) for n in _counts(args.n_gen, "-n")]
    if not tests or args.repetitions < 1:
        raise UsageError("nothing to measure: -p and -n are both 0, or -r is below 1")
    engine = {name: value for name, value in engine_arguments(args).items() if value is not None}
    budget = engine.pop("ram_budget", None)
    caps = [budget] if args.cap is None else [word.strip() for word in args.cap.split(",")]
    engine.setdefault("n_context", _context(args.model, tests))
    rows = climb(args.model, caps=caps, tests=tests, repetitions=args.repetitions, engine=engine,
                 told=_tell)  # fmt: skip
    print(FORMATS[args.output](rows, about_machine()), end="")
    return 1 if all(row.failed for row in rows) else 0


def _context(model: str, tests: list[tuple[str, int]]) -> int:
    """As llama-bench does: a context for the longest test and no more."""
    with open_container(model) as container:
        config, _ = assembly.read_config(container)
    longest = max(n + (1 if kind == "pp" else TG_PROMPT + 1) for kind, n in tests)
    return min(longest, config.n_context)


def _counts(text: str, flag: str) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} takes numbers such as 128,512, not {text!r}") from None
    if any(n < 0 for n in counts):
        raise UsageError(f"{flag} takes numbers from 0, not {text!r}")
    return [n for n in counts if n]


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
