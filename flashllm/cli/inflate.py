"""`flashllm inflate MODEL OUT --size 1GiB`: the same function with more bytes, for measuring."""

from __future__ import annotations

import argparse
import sys

from ..conversion.enlarge import inflate
from ..units import format_size, parse_size
from .progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="a checkpoint or container of the llama family")
    parser.add_argument("output", help="the .flash file to write")
    parser.add_argument("--size", default="1GiB", help="bytes of the container to reach")
    parser.add_argument("--quant", default="int8",
                        choices=("keep", "f32", "f16", "bf16", "int8", "int4"))
    parser.add_argument("--codec", default="raw", choices=("auto", "raw", "zstd", "planes"))
    parser.add_argument("--apart", action="store_true",
                        help="copies of a neuron do not fire together (most are decoys)")
    parser.add_argument("--seed", type=int, default=0, help="of permutations and jitter")
    parser.add_argument("--overwrite", action="store_true")


def run(args: argparse.Namespace) -> int:
    progress = Progress()
    report = inflate(
        args.input, args.output, size_bytes=parse_size(args.size), quant=args.quant,
        codec=args.codec, apart=args.apart, seed=args.seed, overwrite=args.overwrite,
        progress=progress,
    )  # fmt: skip
    progress.close()
    print(f"{args.output}: {format_size(report.output_bytes)}", file=sys.stderr)
    return 0
