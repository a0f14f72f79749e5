"""The cap at full size: resident's tokens, no kill, the limit never hit, the peak under budget.

    python bench/cap_acceptance.py MODEL.flash … --caps 50%,25% --tokens 64 --out bench/results/cap

For each model and cap: a fresh process in a memory cgroup of exactly the budget, cold (checked
with mincore), 64 greedy tokens against a fully resident run; then in a group 25 % larger, where the
kernel's peak must stay under the budget; then the mmap backend at 50 %.  Exit status 1 on a breach.
`--add` keeps the rows of other models that the card already has: big files can come one by one.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from confined import run_confined  # noqa: E402
from frontier import PROMPT  # noqa: E402

from flashllm.stress.confine import cached_bytes  # noqa: E402
from flashllm.units import MIB, parse_size  # noqa: E402

HEAD = """Each run is a fresh process in a memory cgroup whose limit is "group MiB", the file's
pages dropped from the page cache before (and checked), its tokens compared with a run that had
everything in memory; the budget is the cap's share of the file.  Made by `bench/cap_acceptance.py`.

| model | file MiB | cap | backend | group MiB | tokens (distinct) | tok/s | peak cgroup MiB | \
peak RSS MiB | limit hits | kills | promises broken |
|""" + " --- |" * 12


def generate(model: Path, budget: int, tokens: int, *, storage: str, group_bytes: int) -> dict:
    command = [
        sys.executable, "-m", "flashllm", "generate", str(model), "--json", "--ignore-eos",
        "--token-ids", ",".join(map(str, PROMPT)), "--max-tokens", str(tokens),
        "--temperature", "0", "--storage", storage, "--ram-budget", str(budget),
    ]  # fmt: skip
    done = run_confined(command, group_bytes=group_bytes, files=[model])
    result = json.loads(done.out) if done.code == 0 else {"stderr": done.err[-1000:]}
    return {"code": done.code, "charges": asdict(done.charges), "result": result,
            "cached_bytes_after": cached_bytes(model)}  # fmt: skip


def judge(run: dict, budget: int, expected: list[int], *, larger: bool) -> list[str]:
    """The promises this run broke."""
    if run["code"]:
        return [f"exit code {run['code']}: {run['result']['stderr']}"]
    flash, charges = run["result"]["flash"], run["charges"]
    broken = []
    if run["result"]["tokens"] != expected[: len(run["result"]["tokens"])]:
        broken.append("tokens differ")
    if charges["oom_kills"] or flash["limit_hits"]:
        broken.append(f"{charges['oom_kills']} kills, limit hit {flash['limit_hits']} times")
    peak = max(charges["peak_bytes"] if larger else 0, flash["peak_rss"])
    if peak > budget:
        broken.append(f"peak {peak} over {budget}")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--caps", default="50%,25%")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--add", action="store_true")
    parser.add_argument("--note", help="a paragraph of the card; kept by --add")
    args = parser.parse_args()
    rows, note, card = [], args.note, args.out.with_suffix(".json")
    if args.add and card.exists():
        names, before = {model.name for model in args.models}, json.loads(card.read_text())
        rows = [row for row in before["rows"] if row["model"] not in names]
        note = note or before.get("note")
    for model in args.models:
        size = model.stat().st_size
        whole = generate(model, 4 * size, args.tokens, storage="direct", group_bytes=8 * size)
        expected = whole["result"]["tokens"]
        cells = []
        for cap in args.caps.split(","):
            budget = parse_size(cap, whole_bytes=size)
            cells += [(cap, "direct", budget, budget), (cap, "direct", budget, budget * 5 // 4)]
        half = parse_size("50%", whole_bytes=size)
        cells.append(("50%", "mmap", half, half))
        for cap, storage, budget, group_bytes in cells:
            run = generate(model, budget, args.tokens, storage=storage, group_bytes=group_bytes)
            broken = judge(run, budget, expected, larger=group_bytes > budget)
            flash = run["result"].get("flash", {})
            rows.append({
                "model": model.name, "file_bytes": size, "cap": cap, "storage": storage,
                "budget_bytes": budget, "group_bytes": group_bytes, "broken": broken,
                "charges": run["charges"],
                "flash": flash, "n_tokens": len(run["result"].get("tokens", [])),
                "distinct_tokens": len(set(expected)),
                "page_cache_bytes_after": run["cached_bytes_after"],
                "tokens_per_s": run["result"].get("timings", {}).get("predicted_per_second"),
            })  # fmt: skip
            print(line(rows[-1]), flush=True)
    card.write_text(json.dumps({"rows": rows, "note": note}))
    head = f"{note}\n\n{HEAD}" if note else HEAD
    args.out.with_suffix(".md").write_text("\n".join([head, *map(line, rows)]) + "\n")
    return 1 if any(row["broken"] for row in rows) else 0


def line(row: dict) -> str:
    return (f"| {row['model']} | {row['file_bytes'] / MIB:.0f} | {row['cap']} | {row['storage']} | "
            f"{row['group_bytes'] / MIB:.0f} | {row['n_tokens']} ({row['distinct_tokens']}) | "
            f"{row['tokens_per_s'] or 0:.2f} | {row['charges']['peak_bytes'] / MIB:.0f} | "
            f"{row['flash'].get('peak_rss', 0) / MIB:.0f} | {row['flash'].get('limit_hits')} | "
            f"{row['charges']['oom_kills']} | {'; '.join(row['broken']) or 'none'} |")


if __name__ == "__main__":
    sys.exit(main())
