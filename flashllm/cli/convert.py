"""`flashllm convert INPUT OUT`: a checkpoint becomes one container."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from ..conversion.convert import convert
from ..conversion.layout import SPARSE_FRAME_BYTES
from ..conversion.relayout import orders_from
from ..models.base import BUNDLINGS
from ..probe.device import choose_storage
from ..tracing import Trace, read_trace
from ..tracing.activity import encode_activity
from ..units import MIB, format_size, parse_size
from .progress import Progress

PROBE_LEAST_BYTES = 64 * MIB  # reads of a smaller file say little about its device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="a checkpoint: directory or file, told by its content")
    parser.add_argument("output", help="the .flash file to write")
    parser.add_argument(
        "--quant", default="keep", choices=("keep", "f32", "f16", "bf16", "int8", "int4")
    )
    parser.add_argument("--codec", default="auto", choices=("auto", "raw", "zstd", "planes"))
    parser.add_argument("--flash-speed", default="probe", metavar="RATE",
                        help="with --codec auto: bytes per second the target device reads, such as "
                             "100M; 'probe' measures the input's device; 'none' decides by size")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="a tokenizer.json or RWKV World vocabulary to carry"
    )
    parser.add_argument("--order", metavar="TRACE", help="lay neurons out by a trace of a "
                        "container that keeps this input's order")
    parser.add_argument("--bundle", choices=BUNDLINGS, help="where an FFN neuron's deciding row "
                        "lies: in its bundle (all) or in a plane apart (split); rows: no neurons, "
                        "every matrix of a dense FFN by rows; default: split where the model is "
                        "naturally sparse, rows where it is not")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    progress = Progress()
    trace = None if args.order is None else read_trace(args.order)
    report = convert(
        args.input,
        args.output,
        quant=args.quant,
        codec=args.codec,
        order=None if trace is None else orders_for(trace),
        activity=None if trace is None else encode_activity(trace),
        bundle=args.bundle,
        flash_bytes_per_s=_flash_speed(args),
        overwrite=args.overwrite,
        tokenizer=args.tokenizer,
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


def _flash_speed(args: argparse.Namespace) -> float | None:
    """What --flash-speed says; a probe reads the largest file of the input."""
    if args.codec != "auto" or args.flash_speed == "none":
        return None
    if args.flash_speed != "probe":
        return float(parse_size(args.flash_speed))
    given = Path(args.input)
    inside = [path for path in given.iterdir() if path.is_file()] if given.is_dir() else [given]
    largest = max(inside, key=lambda path: path.stat().st_size, default=None)
    if largest is None or not largest.is_file() or largest.stat().st_size < PROBE_LEAST_BYTES:
        return None
    return choose_storage(largest).curve.sequential_bytes_per_s


def orders_for(trace: Trace) -> dict:
    """Layer -> order, for frames as a conversion to the trace's weight type would make them."""
    return orders_from(trace, {
        info.plane: -(-SPARSE_FRAME_BYTES // info.bundle_bytes) for info in trace.layers
    })  # fmt: skip


def _show(report) -> None:
    print(f"{report.output}: {report.family}, {format_size(report.output_bytes)} from "
          f"{format_size(report.source_bytes)} ({report.ratio:.2f}x smaller), "
          f"{report.seconds:.1f} s", file=sys.stderr)
    for group, decision in report.codecs.items():
        said = ", ".join(f"{key} {value}" for key, value in decision.items())
        print(f"  {group}: {said}", file=sys.stderr)
