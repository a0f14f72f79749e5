"""`flashllm simulate TRACE`: what a policy, a cache, a frame size and an order would cost."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..cache import POLICIES
from ..errors import UsageError
from ..probe.curve import DeviceCurve
from ..probe.named import CURVES
from ..simulate import Row, simulate
from ..tracing import Trace, read_trace
from ..tracing.activity import layer_use
from ..tracing.order import order_for
from ..units import format_size, parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", help="a .fltrace file")
    parser.add_argument("--policy", default="all", help="all, or names with commas between; "
                        "window:TOKENS and lfu:DECAY for others than the default")
    parser.add_argument("--cache", default="5%,10%,25%,50%", help="shares of each layer's frames")
    parser.add_argument("--per-frame", default="1", help="bundles per frame; commas between")
    parser.add_argument("--unit", default="1", help="neighbouring bundles predicted together; "
                        "commas between")
    parser.add_argument("--predictor", default="none", help="what asks ahead: none, oracle, dense, "
                        "window:TOKENS, noisy:RECALL:PRECISION; commas between")
    parser.add_argument("--shares", default="equal", help="slots of layers: equal, or use (what "
                        "they use in the trace of --order, else in this one); commas between")
    parser.add_argument("--bundle-bytes", help="imagine bundles of this size; default: as recorded")
    parser.add_argument("--order", metavar="TRACE", help="also lay bundles out by another trace")
    parser.add_argument("--curve", default="all",
                        help=f"all, a file, or of {', '.join(CURVES)}; commas between")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    trace = read_trace(args.trace)
    per_frames = [_number(word, "--per-frame") for word in args.per_frame.split(",")]
    curves = [_curve(name) for name in (CURVES if args.curve == "all" else args.curve.split(","))]
    options = {
        "policies": POLICIES.names() if args.policy == "all" else args.policy.split(","),
        "caches": [share(word) for word in args.cache.split(",")],
        "curves": curves,
        "predictors": args.predictor.split(","),
        "shares": {name: _weights(name, trace, args.order) for name in args.shares.split(",")},
        "units": [_number(word, "--unit") for word in args.unit.split(",")],
        "bundle_bytes": None if args.bundle_bytes is None else parse_size(args.bundle_bytes),
    }
    rows = []
    for per_frame in per_frames:
        orders = {"file": None}
        if args.order is not None:
            orders["fitted"] = fitted_orders(trace, args.order, per_frame)
        rows += simulate(trace, per_frames=[per_frame], orders=orders, **options)
    if args.json:
        print(json.dumps([row.to_dict() for row in rows]))
    else:
        show(rows, [curve.name for curve in curves])
    return 0


def fitted_orders(trace, path: str, per_frame: int) -> list:
    """Per layer an order fitted to the trace at `path`, which must be of the same layers."""
    other = read_trace(path)
    if other.layers != trace.layers:
        raise UsageError(f"{path} has other layers than {trace.path}")
    return [order_for(other.bits(i), per_frame=per_frame) for i in range(len(other.layers))]


def show(rows: list[Row], curves: list[str]) -> None:
    """A table; `ms` per device and, after the stroke, what reading in sequence would take;
    *wasted*: read ahead for a predictor, with nothing active in it."""
    head = f"{'order':7} {'unit':>4} {'frame':>14} {'predictor':14} {'cache':>12} {'policy':9} "
    head += f"{'hits':>6} {'>belady':>8} {'reads':>8} {'bytes':>10} {'useful':>7} {'wasted':>10}"
    print(head + "".join(f"{name + ' ms':>18}" for name in curves) + "   (per token)")
    for row in rows:
        frame = f"{row.per_frame} x {format_size(row.frame_bytes // row.per_frame)}"
        over = "-" if row.above_belady is None else f"{100 * row.above_belady:.0f} %"
        useful = "-" if row.useful is None else f"{100 * row.useful:.0f} %"
        cache = f"{100 * row.cache:.0f} % {row.shares}"
        line = (f"{row.order:7} {row.unit:>4} {frame:>14} {row.predictor:14} {cache:>12} "
                f"{row.policy:9} {100 * row.hit_rate:>5.1f}% {over:>8} {row.ops_per_token:>8.1f} "
                f"{format_size(round(row.bytes_per_token)):>10} {useful:>7} "
                f"{format_size(round(row.wasted_bytes_per_token)):>10}")
        print(line + "".join(f"{row.ms[name]:>9.2f} /{row.sweep_ms[name]:>7.2f}"
                             for name in curves))


def _weights(name: str, trace: Trace, other: str | None) -> list[float] | None:
    if name not in ("equal", "use"):
        raise UsageError(f"--shares takes equal and use, not {name!r}")
    return None if name == "equal" else layer_use(trace if other is None else read_trace(other))


def _number(word: str, flag: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise UsageError(f"{flag} takes numbers, not {word!r}") from None


def share(word: str) -> float:
    try:
        return float(word.strip().removesuffix("%")) / 100
    except ValueError:
        raise UsageError(f"--cache takes shares such as 10%, not {word!r}") from None


def _curve(name: str) -> DeviceCurve:
    return DeviceCurve.load(name) if Path(name).is_file() else CURVES[name]
