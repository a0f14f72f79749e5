"""Eviction policies, their windows, and caches: simulated on the committed traces.

    python bench/policies.py [--out bench/results/policies]

Misses of a trace under each policy, one bundle a frame in the order of the file, every layer with a
cache of the same share of its bundles.  This is what the default policy is chosen by.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from cards import write_card

from flashllm import __version__
from flashllm.probe.named import CURVES
from flashllm.simulate import simulate
from flashllm.tracing import read_trace
from flashllm.units import KIB

TRACES = Path(__file__).parent.parent / "traces"
NAMES = ("demo-books-test", "demo-plays-test", "stories-test")
POLICIES = ("window:1", "window:2", "window:5", "window:10", "window:20", "window:50", "lru",
            "lfu:0.5", "lfu:0.8", "lfu:0.9", "lfu:0.95", "lfu:0.99", "belady")  # fmt: skip
CACHES = (0.05, 0.1, 0.25, 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="card without suffix; default: print it")
    args = parser.parse_args()
    curves, rows = [CURVES[name] for name in ("default", "ufs4", "emmc")], []
    for name in NAMES:
        found = simulate(
            read_trace(TRACES / f"{name}.fltrace"), policies=POLICIES, caches=CACHES,
            per_frames=[1], curves=curves, bundle_bytes=6 * KIB,
        )  # fmt: skip
        rows += [{"trace": name, **asdict(row)} for row in found]
        print(name, file=sys.stderr, flush=True)
    text = card(rows)
    if args.out is None:
        print(text)
        return 0
    write_card(args.out, {"flashllm": __version__, "rows": rows}, text)
    return 0


def card(rows: list[dict]) -> str:
    lines = [
        "# Policies, windows and caches, simulated", "",
        "Bundles of 6 KiB, one a frame, in the order of the file. Hit rate, and in brackets misses "
        "beyond Belady's as a share of them. `window:5` keeps what the last 5 tokens used, "
        "`lfu:0.9` forgets a tenth of a use per token. `bench/policies.py` makes this table.", "",
        "| trace | policy | " + " | ".join(f"cache {100 * c:.0f} %" for c in CACHES) + " |",
        "|" + " --- |" * (2 + len(CACHES)),
    ]  # fmt: skip
    for name in NAMES:
        for policy in POLICIES:
            mine = [r for r in rows if (r["trace"], r["policy"]) == (name, policy)]
            cells = " | ".join(
                f"{100 * r['hit_rate']:.1f} % (+{100 * r['above_belady']:.0f} %)" for r in mine
            )
            lines.append(f"| {name} | {policy} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
