"""`flashllm inspect MODEL`: what a container holds."""

from __future__ import annotations

import argparse
import json

from ..container import open_container
from ..models.base import bundling
from ..units import format_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a .flash container")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    with open_container(args.model) as container:
        summary = {**container.summary(), "bundle": bundling(container.planes)}
        if args.json:
            print(json.dumps(summary))
            return 0
        print(f"{container.path}: {container.family}, {format_size(container.size)}, "
              f"digest {container.digest[:16]}")
        for name, value in container.config.items():
            print(f"  {name}: {value}")
        if said := _layout(container.planes):
            print(f"  layout: {said}")
        print(f"{'plane':<24}{'items':>9}{'frames':>9}{'frame':>12}{'stored':>12}  codec   pieces")
        for plane in container.planes.values():
            pieces = " | ".join(f"{p.name} {p.weight_type}[{p.n_cols}]" for p in plane.pieces)
            print(f"{plane.name:<24}{plane.n_items:>9}{plane.n_frames:>9}"
                  f"{format_size(plane.frame_bytes):>12}{format_size(int(plane.stored.sum())):>12}"
                  f"  {plane.codec:<7} {pieces}")
        for name, value in sorted(container.meta.items()):
            print(f"{name}: {value}")
    return 0


def _layout(planes) -> str | None:
    """How a neuron's pieces lie, and how many neurons lie in a frame; None without such planes."""
    bundle, sizes = bundling(planes), set()
    for name, plane in planes.items():
        if name.endswith(".ffn"):
            sizes.add(plane.per_frame)
            pieces = " | ".join(piece.name for piece in plane.pieces)
    if bundle == "rows":
        return "rows (each matrix of an FFN in a plane of its own)"
    if bundle is None or not sizes:
        return None
    apart = ", deciding rows in planes of their own" if bundle == "split" else ""
    counts = ", ".join(map(str, sorted(sizes)))
    return f"{bundle} (bundles of {pieces}{apart}), {counts} bundles per frame"
