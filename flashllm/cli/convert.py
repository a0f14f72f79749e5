"""`flashllm convert INPUT OUT`: a checkpoint becomes one container."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from ..conversion.convert import convert
from ..units import format_size
from .progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="a checkpoint: directory or file, told by its content")
    parser.add_argument("output", help="the .flash file to write")
    parser.add_argument(
        "--quant", default="keep", choices=("keep", "f32", "f16", "bf16", "int8", "int4")
    )
    parser.add_argument("--codec", default="auto", choices=("auto", "raw", "zstd", "planes"))
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    progress = Progress()
    report = convert(
        args.input,
        args.output,
        quant=args.quant,
        codec=args.codec,
        overwrite=args.overwrite,
        progress=progress,
    )
    progress.close()
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        json.dump(asdict(report), sys.stdout)
        print()
    else:
        _show(report)
    return 0


def _show(report) -> None:
    print(f"{report.output}: {report.family}, {format_size(report.output_bytes)} from "
          f"{format_size(report.source_bytes)} ({report.ratio:.2f}x smaller), "
          f"{report.seconds:.1f} s", file=sys.stderr)
    for group, decision in report.codecs.items():
        said = ", ".join(f"{key} {value}" for key, value in decision.items())
        print(f"  {group}: {said}", file=sys.stderr)
