"""Single neurons or clusters of them, as the unit of reading and of prediction: simulated.

    python bench/clusters.py [--out bench/results/clusters]

Replays the committed traces (traces/README.md), each in the order of the file and in one fitted to
another trace of the same model, with `n` bundles to a frame and, apart from that, `u` neighbours
predicted together without error.  Bundles are imagined as large as those of larger models.  Flash
time is that of named device curves; gaps are read through where the curve says that it is cheaper,
so frames of one bundle are merged into larger reads all the same.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from cards import write_card

from flashllm import __version__
from flashllm.cli.simulate import fitted_orders
from flashllm.probe.named import CURVES
from flashllm.simulate import simulate
from flashllm.tracing import read_trace
from flashllm.units import KIB, format_size

TRACES = Path(__file__).parent.parent / "traces"
PAIRS = ("demo-books", "demo-plays", "stories")
# Bundles of a 1.1 B model in int4, the 1 GiB model of these cards, a 1.1 B and a 7 B model in int8.
BUNDLES = (2 * KIB, 4 * KIB, 6 * KIB, 12 * KIB)
FRAMES = (1, 2, 4, 8, 16)
UNITS = (1, 4, 16)
SHOWN = 4 * KIB


def rows_of(pair: str, cache: float, policy: str) -> list[dict]:
    trace = read_trace(TRACES / f"{pair}-test.fltrace")
    fit, rows = str(TRACES / f"{pair}-fit.fltrace"), []
    curves = [curve for _, curve in CURVES.items()]
    for n in FRAMES:
        orders = {"file": None, "fitted": fitted_orders(trace, fit, n)}
        for n_bytes in BUNDLES:
            rows += simulate(
                trace, policies=[policy], caches=[cache], per_frames=[n], curves=curves,
                orders=orders, bundle_bytes=n_bytes,
                units=UNITS if (n, n_bytes) == (1, SHOWN) else (1,),
            )  # fmt: skip
        print(pair, n, file=sys.stderr, flush=True)
    return [{"trace": pair, **asdict(row)} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=float, default=0.25, help="share of each layer")
    parser.add_argument("--policy", default="lfu")
    parser.add_argument("--out", type=Path, help="card without suffix; default: print it")
    args = parser.parse_args()
    rows = [row for pair in PAIRS for row in rows_of(pair, args.cache, args.policy)]
    text = card(rows, args)
    if args.out is None:
        print(text)
        return 0
    about = {"flashllm": __version__, "cache": args.cache, "policy": args.policy}
    write_card(args.out, about | {"rows": rows}, text)
    return 0


def card(rows: list[dict], args: argparse.Namespace) -> str:
    names = list(CURVES)
    lines = [
        "# Clusters of neurons against single ones, simulated", "",
        f"Committed traces; {100 * args.cache:.0f} % of each layer cached under {args.policy}; "
        "orders fitted to the trace of another text. Per token, over all layers. *unit*: "
        "neighbours predicted together, without error; *frame*: bundles read together. ms is flash "
        "time on the named curve. `bench/clusters.py` makes this table.", "",
        f"## Bundles of {format_size(SHOWN)}", "",
        "| trace | order | unit | frame | reads | MiB | useful | "
        + " | ".join(f"{name} ms" for name in names) + " |",
        "|" + " --- |" * (7 + len(names)),
    ]  # fmt: skip
    for row in rows:
        if row["frame_bytes"] // row["per_frame"] == SHOWN:
            ms = " | ".join(f"{row['ms'][name]:.2f}" for name in names)
            lines.append(
                f"| {row['trace']} | {row['order']} | {row['unit']} | {row['per_frame']} | "
                f"{row['ops_per_token']:.0f} | {row['bytes_per_token'] / 2**20:.2f} | "
                f"{100 * row['useful']:.0f} % | {ms} |"
            )
    lines += [
        "", "## Time against frames of one neuron, fitted order", "",
        "| trace | bundle | frame | " + " | ".join(names) + " |", "|" + " --- |" * (3 + len(names)),
    ]  # fmt: skip
    single = {}
    for row in rows:
        n_bytes = row["frame_bytes"] // row["per_frame"]
        if row["order"] != "fitted" or row["unit"] != 1:
            continue
        if row["per_frame"] == 1:
            single[row["trace"], n_bytes] = row["ms"]
            continue
        base = single[row["trace"], n_bytes]
        ratios = " | ".join(f"{row['ms'][name] / base[name]:.2f}" for name in names)
        lines.append(
            f"| {row['trace']} | {format_size(n_bytes)} | {row['per_frame']} | {ratios} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
