"""Curves of runs that differ in one setting, in one picture: what the sparsity penalty costs.

    python compare.py "with the penalty=WORKDIR" "without=WORKDIR" --out short_pair

Writes OUT.csv and OUT.svg from the runs' checkpoints, finished or not.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from report import curve_svg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="NAME=WORKDIR")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    args = parser.parse_args()
    runs = {}
    for given in args.runs:
        name, _, work = given.partition("=")
        runs[name] = torch.load(Path(work) / "checkpoint.pt", weights_only=True)["curve"]
    with open(args.out.with_suffix(".csv"), "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["run", "tokens", "train_nats_per_token", "valid_bits_per_char",
                         "active_share"])  # fmt: skip
        for name, rows in runs.items():
            writer.writerows([name, int(t), f"{n:.4f}", f"{b:.4f}", f"{a:.4f}"]
                             for _, t, n, b, a in rows)
    shown = {name: rows[1:] for name, rows in runs.items()}  # the first is an untrained model
    bits = [row[3] for rows in shown.values() for row in rows]
    low, high = int(10 * min(bits)) / 10, int(10 * max(bits) + 1) / 10
    args.out.with_suffix(".svg").write_text(
        curve_svg(shown, unit="million tokens", tick=0.25, bits=(low, high)), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
