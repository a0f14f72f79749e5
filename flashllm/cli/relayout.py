"""`flashllm relayout MODEL -o NEW`: neurons that fire together side by side, pieces elsewhere."""

from __future__ import annotations

import argparse
import sys

from ..conversion.relayout import relayout
from .options import whole
from .progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a .flash container")
    parser.add_argument("--trace", help="a trace of this very container; default: no new order")
    parser.add_argument("-o", "--output", required=True, help="the .flash file to write")
    parser.add_argument("--bundle", choices=("all", "split"), help="all: a neuron's deciding row "
                        "lies in its bundle too (for --mode approx); split: apart; default: as it "
                        "is")
    parser.add_argument("--per-frame", type=whole(1), help="bundles per frame; default: with "
                        "--trace or --bundle all one, or as few as padding allows")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    progress = Progress()
    report = relayout(args.model, args.output, trace=args.trace, bundle=args.bundle,
                      per_frame=args.per_frame, overwrite=args.overwrite,
                      progress=progress)  # fmt: skip
    progress.close()
    sizes = sorted(set(report.per_frame.values()))
    print(f"{report.output}: bundle {report.bundle}, {report.moved} layers in a new order, "
          f"{', '.join(map(str, sizes))} bundles per frame, {report.seconds:.1f} s",
          file=sys.stderr)  # fmt: skip
    return 0
