"""`flashllm estimate MODEL`: the ledger and the expected speed, without loading anything."""

from __future__ import annotations

import argparse
import json

from .. import assembly
from ..units import format_size
from .options import add_engine_flags, engine_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a .flash container")
    parser.add_argument("--json", action="store_true")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    estimate = assembly.estimate(args.model, **engine_arguments(args))
    if args.json:
        print(json.dumps(estimate.to_dict()))
        return 0
    print(estimate.plan.ledger.render())
    print(f"floor                    {format_size(estimate.floor_bytes)}")
    print(f"streamed per token       {format_size(estimate.plan.bytes_per_token)} (at most)")
    print(f"device                   {estimate.device}")
    print(f"reading alone allows     {estimate.read_tokens_per_s:.2f} tok/s"
          if estimate.read_tokens_per_s else "reading                  nothing: all of it fits")
    return 0
