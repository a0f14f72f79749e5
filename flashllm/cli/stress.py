"""`flashllm stress [MODEL]`: does the cap hold on this machine?  A table, and an exit code.

Without a model the bundled one is widened first.  Exit code 1 on any breach.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from ..bundled import bundled_model
from ..container import open_container
from ..stress.cases import KINDS, Row, Scale, Stress
from ..stress.confine import can_confine
from ..units import MIB, parse_size
from .options import seconds

QUICK_S, FULL_S = 60, 600
HEAD = ("case", "storage", "cache", "cap", "rss", "anon", "mapped", "cgroup", "failcnt", "oom",
        "same", "tok/s", "")  # fmt: skip
WIDTHS = (18, 7, 5, 7, 7, 7, 7, 7, 7, 4, 5, 8, 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a .flash container; default: the bundled, wider")
    parser.add_argument("--quick", action="store_true", help="each thing once, about a minute")
    parser.add_argument("--only", action="append", choices=KINDS,
                        help="this kind of check; may be given more than once; default: all")
    parser.add_argument("--soak", type=seconds, metavar="SECONDS",
                        help="instead: one engine at half of the model for so long, memory flat")
    parser.add_argument("--seconds", type=seconds, help="time budget; default 600, 60 with --quick")
    parser.add_argument("--size", help="of the widened model; default 1GiB, else 192MiB")
    parser.add_argument("--dir", help="where to put it; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    scale = Scale.of(args.seconds or (QUICK_S if args.quick else FULL_S), args.quick)
    with ExitStack() as stack:
        folder = args.dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="flashllm-"))
        if args.model is None:
            model = _widened(args, Path(folder))
        else:
            model = args.model
            open_container(model).close()  # what is wrong with it is better said here, and once
        why_not = can_confine()
        limit = "memory cgroup of exactly the cap" if why_not is None else (
            f"RLIMIT_DATA and RSS sampled every millisecond ({why_not})")
        told = (lambda row: None) if args.json else _show
        if not args.json:
            print(f"{model}: {Path(model).stat().st_size / MIB:.1f} MiB; limit: {limit}; MiB below")
            print(_line(HEAD), flush=True)
        stress = Stress(model, small=bundled_model(), scale=scale, told=told)
        rows = stress.run(args.only or KINDS) if args.soak is None else stress.soak(args.soak)
    broken = [row for row in rows if row.breaches]
    taken = time.monotonic() - started
    if args.json:
        print(json.dumps({"limit": limit, "seconds": taken, "breaches": len(broken),
                          "rows": [row.to_dict() for row in rows]}))  # fmt: skip
    else:
        print(f"{len(rows)} cases, {len(broken)} with a broken promise, {taken:.0f} s")
    return 1 if broken else 0


def _widened(args: argparse.Namespace, folder: Path) -> str:
    from ..conversion.enlarge import inflate

    folder.mkdir(parents=True, exist_ok=True)
    small = args.quick or args.soak is not None
    size = parse_size(args.size or ("192MiB" if small else "1GiB"))
    out = folder / f"stress-{size // MIB}MiB.flash"
    if not out.exists():
        print(f"widening the bundled model to {size // MIB} MiB …", file=sys.stderr, flush=True)
        inflate(bundled_model(), out, size_bytes=size)
    return str(out)


def _show(row: Row) -> None:
    speed = "-" if row.tokens_per_s is None else f"{row.tokens_per_s:.2f}"
    same = {None: "-", True: "yes", False: "NO"}[row.identical]
    said = "; ".join((*(f"BROKEN: {breach}" for breach in row.breaches), row.note))
    print(_line((
        row.case, row.storage, row.cache, _mib(row.cap), _mib(row.peak_rss), _mib(row.peak_anon),
        _mib(row.peak_mapped), _mib(row.cgroup_peak), _count(row.failcnt), _count(row.oom_kills),
        same, speed, said.strip("; "),
    )), flush=True)  # fmt: skip


def _line(fields: tuple[str, ...]) -> str:
    left = 3
    cells = [f"{text:<{width}}" if i < left else f"{text:>{width}}"
             for i, (text, width) in enumerate(zip(fields, WIDTHS, strict=True))]  # fmt: skip
    return " ".join(cells[:-1]) + ("  " + cells[-1] if fields[-1] else "")


def _mib(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / MIB:.1f}"


def _count(n: int | None) -> str:
    return "-" if n is None else str(n)
