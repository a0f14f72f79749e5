"""The card of one run of `make bench`: every micro-benchmark as a ratio to its named baseline.

    make bench
    python bench/micro_card.py build/micro.json --out bench/results/micro
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cards import write_card  # noqa: E402

from flashllm.benchmark.machine import about_machine  # noqa: E402

HEAD = ("what", "baseline", "times faster", "ours us", "baseline us", "GB/s")
ABOUT = (
    "One run of `make bench`. A ratio is the baseline's time over ours, the least of 15 rounds of "
    "each: 1 is as fast as the baseline, more is faster. memcpy moves the same bytes once; BLAS is "
    "NumPy's, in float32, with the same threads; the loop of reads asks for one after another."
)


def rows_of(told: dict[str, Any]) -> list[dict[str, Any]]:
    """What counts of pytest-benchmark's JSON, in its order; nothing of the machine's folders."""
    return [
        {"name": one["name"].removeprefix("test_"),
         "file": Path(one["fullname"].partition("::")[0]).name,
         "baseline": info["baseline"], "ratio": info["ratio"], "s": one["stats"]["min"],
         "median_s": one["stats"]["median"], "baseline_s": info["baseline_s"],
         "bytes_per_s": info.get("bytes_per_s")}
        for one in told["benchmarks"] for info in [one["extra_info"]]
    ]  # fmt: skip


def table(card: dict[str, Any]) -> str:
    lines = ["# Micro-benchmarks", "", card["about"], ""]
    lines += [f"- {key}: {value}" for key, value in card["machine"].items()]
    for file in dict.fromkeys(row["file"] for row in card["rows"]):
        lines += ["", f"## {file}", "", f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
        for row in card["rows"]:
            if row["file"] == file:
                rate = row["bytes_per_s"]
                cells = (row["name"], row["baseline"], f"{row['ratio']:.3g}",
                         f"{1e6 * row['s']:.4g}", f"{1e6 * row['baseline_s']:.4g}",
                         f"{rate / 1e9:.2f}" if rate else "")  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="pytest-benchmark's JSON")
    parser.add_argument("--note", default="", help="said after what the card always says")
    parser.add_argument("--out", type=Path, required=True, help="card without suffix")
    args = parser.parse_args()
    told = json.loads(args.run.read_text())
    card = {"about": f"{ABOUT} {args.note}".strip(), "machine": about_machine(),
            "rows": rows_of(told)}  # fmt: skip
    write_card(args.out, card, table(card))
    print(table(card))
    return 0


if __name__ == "__main__":
    sys.exit(main())
