"""`flashllm trace MODEL --text FILE --tokens N -o OUT`: which neurons a text activates."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

from ..api import LLM
from ..calibration.recording import record
from ..errors import UsageError
from ..tracing import read_trace, statistics
from ..tracing.card import card
from .options import add_engine_flags, engine_arguments, whole
from .progress import Progress
from .streams import read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a .flash container")
    parser.add_argument("--text", required=True, help="a UTF-8 text file")
    parser.add_argument("--tokens", type=whole(1), default=1024,
                        help="tokens to record (default 1024)")
    parser.add_argument("--skip", type=whole(0), default=0,
                        help="characters to leave out at the start")
    parser.add_argument("--text-name", help="what the text is called; default: the file's name")
    parser.add_argument("--window", type=whole(1), help="tokens per context; default: the model's")
    parser.add_argument("-o", "--output", required=True, help="the .fltrace file to write")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    out = Path(args.output)
    if out.suffix != ".fltrace":
        raise UsageError(f"the trace's name must end with .fltrace: {out}")
    text = read_text(args.text)[max(0, args.skip) :]
    name = args.text_name or Path(args.text).name
    if args.skip:
        name += f" from character {args.skip}"
    progress = Progress()
    with LLM(args.model, progress=None, **engine_arguments(args)) as llm:
        record(llm, text, out, n_tokens=args.tokens, text_name=name, window=args.window,
               progress=progress)  # fmt: skip
    progress.close()
    trace = read_trace(out)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    said = card(trace, statistics(trace), model_name=Path(args.model).name, date=today,
                n_bytes=out.stat().st_size)  # fmt: skip
    out.with_suffix(".md").write_text(said, encoding="utf-8")
    print(said)
    print(f"{out} and {out.with_suffix('.md')}", file=sys.stderr)
    return 0
