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
    report = verify(args.model, progress=progress)
    progress.close()
    print(report.render(), file=sys.stderr)
    return 0 if report.ok else 3
