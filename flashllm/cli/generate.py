"""`flashllm generate MODEL --prompt TEXT`: text on stdout as it comes, or one JSON object.

Several prompts decode together, and their texts follow when all are done, a JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack

from ..api import LLM, Delta, Result
from ..durable import expect_other
from ..errors import UsageError
from .footer import approximation
from .options import add_engine_flags, engine_arguments, token_ids
from .progress import Progress
from .streams import read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a .flash container")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", "-p", action="append",
                        help="text; - reads stdin; given more than once, all decode together")
    prompt.add_argument("--token-ids", help="ids such as 1,2,3 (no tokenizer needed)")
    parser.add_argument("--max-tokens", "-n", type=int, default=256)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], help="may be given more than once")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--trace", metavar="FILE", help="a JSON line per token, for `plot`")
    parser.add_argument("--verbose", "-v", action="store_true", help="effective settings and times")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    sampling = {
        name: getattr(args, name)
        for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p",
                     "repetition_penalty", "seed", "stop", "ignore_eos")
    }
    progress = Progress()
    with LLM(
        args.model, progress=progress, on_plan=_print_plan, **engine_arguments(args)
    ) as llm:
        if args.prompt is not None and len(args.prompt) > 1:
            return _several(args, llm, sampling, progress)
        prompt, result = _prompt(args), None
        with ExitStack() as stack:
            heard = _journal(args.trace, llm, stack)
            for delta in llm.stream(prompt, **sampling):
                progress.close()
                heard(delta)
                if not args.json:
                    _show(delta, llm)
                result = delta.result
        if args.json:
            print(json.dumps(result.to_dict()))
            return 0
        print()
        print(_summary(result), file=sys.stderr)
        if args.verbose:
            print(json.dumps({"params": result.params, "timings": result.timings,
                              "flash": result.flash}, indent=2), file=sys.stderr)
    return 0


def _journal(path: str | None, llm: LLM, stack: ExitStack) -> Callable[[Delta], None]:
    """Who hears of each delta: nobody, or the journal at `path`, closed with the stack."""
    if path is None:
        return lambda delta: None
    from ..benchmark.journal import Journal

    expect_other(path, llm.container.path, "the model")
    return Journal(stack.enter_context(open(path, "w", encoding="utf-8")), llm).heard


def _show(delta: Delta, llm: LLM) -> None:
    if llm.tokenizer is None:
        print(*delta.tokens, end=" " if delta.tokens else "", flush=True)
    else:
        print(delta, end="", flush=True)


def _prompt(args: argparse.Namespace) -> str | list[int]:
    if args.token_ids is not None:
        return token_ids(args.token_ids)
    return _text(args.prompt[0])


def _text(given: str) -> str:
    text = read_text("-") if given == "-" else given
    if not text:
        raise UsageError("the prompt is empty")
    return text


def _several(args: argparse.Namespace, llm: LLM, sampling: dict, progress: Progress) -> int:
    """All prompts in one call; one trace could not say which of them it is of."""
    if args.trace:
        raise UsageError("--trace follows one prompt")
    prompts = [_text(given) for given in args.prompt]
    results = llm.generate(prompts, **sampling)
    progress.close()
    for prompt, result in zip(prompts, results, strict=True):
        if args.json:
            print(json.dumps(result.to_dict()))
        else:
            print(f"{prompt}{result.text}\n")
    if not args.json:
        print(_together(results), file=sys.stderr)
    return 0


def _together(results: list[Result]) -> str:
    n_tokens = sum(len(result.tokens) for result in results)
    flash, speed = results[0].flash, results[0].timings.get("group_predicted_per_second")
    parts = [f"{len(results)} prompts, {flash['sequences']} at once", f"{n_tokens} tok"]
    if flash["sequences_limit"] is not None:
        parts[0] += f" (limited by {flash['sequences_limit']})"
    if speed:
        parts.append(f"{speed:.2f} tok/s together")
    return " | ".join(parts) + approximation(flash)


def _print_plan(plan) -> None:
    print(plan.ledger.render(), file=sys.stderr, flush=True)


def _summary(result) -> str:
    flash, timings = result.flash, result.timings
    speed = timings["predicted_per_second"]
    parts = [f"{len(result.tokens)} tok"]
    if speed:
        parts.append(f"{speed:.2f} tok/s")
    parts.append(f"read {flash['bytes_read'] / 2**20:.1f} MiB")
    if flash["hit_rate"] is not None:
        parts.append(f"hit {100 * flash['hit_rate']:.0f} %")
    return " | ".join(parts) + approximation(flash)
