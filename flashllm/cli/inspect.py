"""`flashllm inspect MODEL`: what a container holds."""

from __future__ import annotations

import argparse
import json

from ..container import open_container
from ..units import format_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a .flash container")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    with open_container(args.model) as container:
        summary = container.summary()
        if args.json:
            print(json.dumps(summary))
            return 0
        print(f"{container.path}: {container.family}, {format_size(container.size)}, "
              f"digest {container.digest[:16]}")
        for name, value in container.config.items():
            print(f"  {name}: {value}")
        print(f"{'plane':<24}{'items':>9}{'frames':>9}{'frame':>12}{'stored':>12}  codec   pieces")
        for plane in container.planes.values():
            pieces = " | ".join(f"{p.name} {p.weight_type}[{p.n_cols}]" for p in plane.pieces)
            print(f"{plane.name:<24}{plane.n_items:>9}{plane.n_frames:>9}"
                  f"{format_size(plane.frame_bytes):>12}{format_size(int(plane.stored.sum())):>12}"
                  f"  {plane.codec:<7} {pieces}")
        for name, value in sorted(container.meta.items()):
            print(f"{name}: {value}")
    return 0
