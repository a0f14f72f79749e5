"""`flashllm plot FILE`: a picture of a trace, a run, a benchmark or a fit; or its numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UsageError
from ..plotting.charts import as_csv
from ..plotting.draw import SUFFIXES, draw
from ..plotting.of_trace import CACHES, POLICIES
from ..plotting.sources import charts_of
from .simulate import share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", help=".fltrace, `generate --trace` lines, `bench -o json`, or .fit"
    )
    parser.add_argument("-o", "--output", help=".png, .svg or .csv; default: FILE.png")
    parser.add_argument("--policy", default=",".join(POLICIES), help="of a trace's cache sweeps")
    parser.add_argument("--cache", default=",".join(f"{100 * c:g}%" for c in CACHES),
                        help="shares of each layer to sweep over")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    out = Path(args.output or f"{args.file}.png")
    suffix = out.suffix.lower()
    if suffix not in (*SUFFIXES, ".csv"):
        raise UsageError(f"{out}: pictures end in {' or '.join(SUFFIXES)}, numbers in .csv")
    caches = [share(word) for word in args.cache.split(",")]
    charts = charts_of(args.file, policies=args.policy.split(","), caches=caches)
    if suffix == ".csv":
        out.write_text(as_csv(charts), encoding="utf-8")
    else:
        draw(charts, out)
    print(out)
    return 0
