"""`flashllm perplexity MODEL --text FILE`: how well a model knows a text."""

from __future__ import annotations

import argparse
import json
import math

from ..api import LLM
from ..engine.engine import Totals
from ..engine.figures import flash_figures
from ..errors import UsageError
from ..evaluation import negative_log_likelihood
from .footer import approximation
from .options import add_engine_flags, engine_arguments, whole
from .progress import Progress
from .streams import read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a .flash container")
    parser.add_argument("--text", required=True, help="a text file; - reads stdin")
    parser.add_argument("--window", type=whole(2), help="tokens per window; default: the context")
    parser.add_argument("--limit", type=whole(1), help="use only this many characters")
    parser.add_argument("--json", action="store_true")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    text = read_text(args.text)[: args.limit]
    if not text:
        raise UsageError("the text is empty")
    progress = Progress()
    totals = Totals()
    with LLM(args.model, progress=Progress(), **engine_arguments(args)) as llm:
        total, n_tokens = negative_log_likelihood(
            llm, text, window=args.window, totals=totals, progress=progress
        )
        mode = llm.mode
    progress.close()
    if n_tokens == 0:
        raise UsageError("the text has no token that comes after another")
    found = {
        "perplexity": math.exp(total / n_tokens),
        "bits_per_character": total / math.log(2) / len(text),
        "tokens": n_tokens,
        "characters": len(text),
        "flash": {"mode": mode, **flash_figures(totals)},
    }
    if args.json:
        print(json.dumps(found))
    else:
        print(f"perplexity {found['perplexity']:.3f} | "
              f"{found['bits_per_character']:.4f} bits/character | {n_tokens} tokens"
              + approximation(found["flash"]))
    return 0
