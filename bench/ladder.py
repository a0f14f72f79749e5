"""Rungs that `flashllm bench` climbed in several calls as one card: a shared machine is held for
minutes only.

    flashllm bench MODEL.flash --cap 100%,75% -o json > a.json
    flashllm bench MODEL.flash --cap 50% -o json > b.json
    python bench/ladder.py a.json b.json --note "what the model is" --out bench/results/bench-ladder

The card's table is the one that `flashllm bench` prints of all rows, largest cap first, and its
JSON is of the same form.  The flash floor of a row is by the probes of its own call.  A completion
must say the same in every row of its test; one that does not is named below the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cards import write_card  # noqa: E402

from flashllm.benchmark.ladder import Row, same_tokens  # noqa: E402
from flashllm.benchmark.table import as_json, markdown  # noqa: E402


def rows_of(told: dict[str, Any]) -> list[Row]:
    """Rows of what `flashllm bench -o json` printed."""
    return [Row(**{name: value for name, value in row.items() if name != "cache"})
            for row in told["rows"]]  # fmt: skip


def joined(calls: list[dict[str, Any]]) -> tuple[list[Row], dict[str, Any]]:
    """(rows from the largest cap down, a rung's tests as they came; what all calls ran on)."""
    ours = ("rows", "flashllm_bench")  # what as_json adds itself
    about = [{key: value for key, value in told.items() if key not in ours} for told in calls]
    if any(one != about[0] for one in about):
        raise SystemExit("these runs are not of one machine and one version")
    rows = [row for told in calls for row in rows_of(told)]
    return same_tokens(sorted(rows, key=lambda row: -(row.cap_bytes or 2**62))), about[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="what `flashllm bench -o json` printed")
    parser.add_argument("--note", default="", help="what the model is, and what ran")
    parser.add_argument("--out", type=Path, required=True, help="card without suffix")
    args = parser.parse_args()
    rows, about = joined([json.loads(path.read_text()) for path in args.runs])
    head = f"# `flashllm bench` from the whole file down\n\n{args.note}\n"
    text = f"{head}\n{markdown(rows, about)}"
    write_card(args.out, json.loads(as_json(rows, about | {"note": args.note})), text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
