"""`flashllm verify MODEL`: every byte against its checksum."""

from __future__ import annotations

import argparse
import sys

from ..container.verification import verify
from ..units import format_size
from .progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a .flash container")


def run(args: argparse.Namespace) -> int:
    progress = Progress()
    found = verify(args.model, progress=lambda done, total: progress(done, total, "verify"))
    progress.close()
    for damage in found.damage:
        print(f"{args.model}: {damage}", file=sys.stderr)
    verdict = "every byte is as written" if found.ok else f"{found.n_damaged} damaged blocks"
    print(f"{args.model}: {format_size(found.size)}, {found.n_frames} frames: {verdict}; "
          f"sha256 {found.sha256}", file=sys.stderr)
    return 0 if found.ok else 3
