"""`flashllm relayout MODEL --trace TRACE -o NEW`: neurons that fire together side by side."""

from __future__ import annotations

import argparse
import sys

from ..conversion.relayout import relayout
from .progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a .flash container")
    parser.add_argument("--trace", required=True, help="a trace of this very container")
    parser.add_argument("-o", "--output", required=True, help="the .flash file to write")
    parser.add_argument("--per-frame", type=int, help="bundles per frame; default: as it is")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    progress = Progress()
    report = relayout(args.model, args.output, trace=args.trace, per_frame=args.per_frame,
                      overwrite=args.overwrite, progress=progress)  # fmt: skip
    progress.close()
    sizes = sorted(set(report.per_frame.values()))
    print(f"{report.output}: {report.moved} layers laid out anew, "
          f"{', '.join(map(str, sizes))} bundles per frame, {report.seconds:.1f} s",
          file=sys.stderr)  # fmt: skip
    return 0
