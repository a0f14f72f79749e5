"""What caches are decided by: policies, windows, shares of layers, predictors, simulated.

    python bench/policies.py [--out bench/results/policies]

Replays the committed test traces, one bundle a frame in the order of the file: misses under each
policy; slots of layers in equal shares or by what another text's trace shows that tokens use; and
what predictors would read ahead, in vain and in all.  The defaults are what wins here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cards import write_card

from flashllm import __version__
from flashllm.probe.named import CURVES
from flashllm.simulate import simulate
from flashllm.tracing import read_trace
from flashllm.tracing.activity import layer_use
from flashllm.units import KIB

TRACES = Path(__file__).parent.parent / "traces"
PAIRS = ("demo-books", "demo-plays", "stories")
POLICIES = ("window:1", "window:2", "window:5", "window:10", "window:20", "window:50", "lru",
            "lfu:0.5", "lfu:0.8", "lfu:0.9", "lfu:0.95", "lfu:0.97", "lfu:0.98", "lfu:0.99",
            "lfu:0.995", "belady")  # fmt: skip
CACHES = (0.05, 0.1, 0.25, 0.5)
# Of a bundle of 1.1 B models in int4 and int8, and of a 7 B model in int8.
BUNDLES = (2 * KIB, 6 * KIB, 12 * KIB)
PREDICTORS = ("none", "oracle", "window:1", "window:4", "noisy:0.99:0.9", "noisy:0.99:0.5",
              "noisy:0.9:0.9", "dense")  # fmt: skip
POLICY = "lfu"


def rows_of(pair: str) -> Iterator[dict]:
    """Rows of one trace; `table` says of which table."""
    trace, curves = read_trace(TRACES / f"{pair}-test.fltrace"), [c for _, c in CURVES.items()]
    use = layer_use(read_trace(TRACES / f"{pair}-fit.fltrace"))
    tables = {
        "policies": [dict(policies=POLICIES, caches=CACHES, bundle_bytes=6 * KIB)],
        "shares": [dict(policies=[POLICY], caches=CACHES[1:], bundle_bytes=n,
                        shares={"equal": None, "use": use}) for n in BUNDLES],
        "predictors": [dict(policies=[POLICY], caches=[0.25], bundle_bytes=6 * KIB,
                            predictors=PREDICTORS)],
    }  # fmt: skip
    for name, many in tables.items():
        for options in many:
            for row in simulate(trace, per_frames=[1], curves=curves, **options):
                yield {"table": name, "trace": pair, **asdict(row)}
        print(pair, name, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="card without suffix; default: print it")
    args = parser.parse_args()
    rows = [row for pair in PAIRS for row in rows_of(pair)]
    text = card(rows)
    if args.out is None:
        print(text)
        return 0
    write_card(args.out, {"flashllm": __version__, "rows": rows}, text)
    return 0


def card(rows: list[dict]) -> str:
    lines = [
        "# Policies, windows, shares of layers and predictors, simulated", "",
        "Committed traces, one bundle a frame, in the order of the file (`bench/policies.py`).", "",
        "## Policies", "",
        "Bundles of 6 KiB. Hit rate, and in brackets misses beyond Belady's as a share of them. "
        "`window:5` keeps what the last 5 tokens used, `lfu:0.9` forgets a tenth of a use per "
        "token.", "",
        "| trace | policy | " + " | ".join(f"cache {100 * c:.0f} %" for c in CACHES) + " |",
        "|" + " --- |" * (2 + len(CACHES)),
    ]  # fmt: skip
    found = {
        (r["trace"], r["policy"], r["cache"]): r for r in rows if r["table"] == "policies"
    }
    for pair in PAIRS:
        for policy in POLICIES:
            cells = " | ".join(
                f"{100 * r['hit_rate']:.1f} % (+{100 * r['above_belady']:.0f} %)"
                for r in (found[pair, policy, cache] for cache in CACHES)
            )
            lines.append(f"| {pair} | {policy} | {cells} |")
    lines += ["", "Misses against `lfu:0.9`, mean of the ratios over traces and caches:", "",
              "| " + " | ".join(POLICIES) + " |", "|" + " --- |" * len(POLICIES),
              "| " + " | ".join(f"{mean_ratio(found, policy):.3f}" for policy in POLICIES) + " |"]
    return "\n".join([*lines, *shares(rows), *predictors(rows)]) + "\n"


def mean_ratio(found: dict, policy: str) -> float:
    ratios = [found[pair, policy, cache]["misses"] / found[pair, "lfu:0.9", cache]["misses"]
              for pair in PAIRS for cache in CACHES]  # fmt: skip
    return sum(ratios) / len(ratios)


def section(title: str, about: str, columns: list[str]) -> list[str]:
    """The head of a further table."""
    heads = "| " + " | ".join(columns) + " |"
    return ["", f"## {title}", "", about, "", heads, "|" + " --- |" * len(columns)]


def shares(rows: list[dict]) -> list[str]:
    """Slots by use against equal ones."""
    lines = section(
        "Shares of layers",
        f"The same number of slots in all, under {POLICY}: every layer the same share of its "
        "bundles, or in proportion to what tokens use of it in the trace of another text. Misses "
        "and flash time by use, of those with equal shares.",
        ["trace", "bundle", "cache", "misses", *CURVES],
    )
    mine = [r for r in rows if r["table"] == "shares"]
    for equal in (r for r in mine if r["shares"] == "equal"):
        use = next(r for r in mine if r["shares"] == "use" and all(
            r[key] == equal[key] for key in ("trace", "cache", "frame_bytes")))  # fmt: skip
        ratios = " | ".join(f"{use['ms'][name] / equal['ms'][name]:.2f}" for name in CURVES)
        lines.append(f"| {equal['trace']} | {equal['frame_bytes'] // KIB} KiB | "
                     f"{100 * equal['cache']:.0f} % | {use['misses'] / equal['misses']:.2f} | "
                     f"{ratios} |")  # fmt: skip
    return lines


def predictors(rows: list[dict]) -> list[str]:
    """What asking ahead would read."""
    lines = section(
        "Predictors",
        f"Bundles of 6 KiB, a quarter cached under {POLICY}; what a predictor names is read before "
        "the truth is known, what it missed after. `noisy:R:P`: recall R, precision P, wrong "
        "evenly at random. Per token; *wasted*: read ahead with nothing active in it. Time is that "
        "of both reads in a row: that the first may hide behind computing is not counted.",
        ["trace", "predictor", "recall", "precision", "reads", "MiB", "wasted MiB",
         *(f"{name} ms" for name in CURVES)],
    )  # fmt: skip
    for r in (r for r in rows if r["table"] == "predictors"):
        quality = " | ".join("-" if r[key] is None else f"{100 * r[key]:.1f} %"
                             for key in ("recall", "precision"))  # fmt: skip
        ms = " | ".join(f"{r['ms'][name]:.2f}" for name in CURVES)
        lines.append(f"| {r['trace']} | {r['predictor']} | {quality} | {r['ops_per_token']:.0f} | "
                     f"{r['bytes_per_token'] / 2**20:.2f} | "
                     f"{r['wasted_bytes_per_token'] / 2**20:.2f} | {ms} |")  # fmt: skip
    return lines


if __name__ == "__main__":
    sys.exit(main())
