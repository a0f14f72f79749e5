"""Mixture of experts under a cap, with routing that repeats itself and with routing that does not.

    python bench/moe_routing.py round MODEL.flash --runs FILE.json --caps 100%,50%,25%
    python bench/moe_routing.py card bench/results/NAME --runs FILE.json

For containers made of random_olmoe.py's checkpoints, where the half of the vocabulary that a prompt
comes from decides which of both.  A round runs every cell once: a fresh process in a memory group
of exactly the cap, cold, greedy.  A cell says how routing really was (which share of a token's
experts was among those of the token before, of the 4 and of the 8 before it), which bytes and reads
a token missed, and the flash floor: what the probed curve asks for just those reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from confined import run_confined

from flashllm.container import open_container
from flashllm.units import MIB, parse_size

HALVES = ("chance", "recurring")
LAGS = (1, 4, 8)
CHILD = """
import json, sys
import flashllm.models.moe as moe
from flashllm import LLM
picks, plain = [], moe.route
def route(scores, n_chosen, **options):
    chosen, weights = plain(scores, n_chosen, **options)
    picks.append(chosen.tolist())
    return chosen, weights
moe.route = route
model, budget, prompt, tokens = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with LLM(model, ram_budget=budget, storage="direct") as llm:
    ids = [int(word) for word in prompt.split(",")]
    result = llm.generate(ids, max_tokens=tokens, temperature=0.0, ignore_eos=True)
print(json.dumps({"picks": picks, "tokens": result.tokens, "timings": result.timings,
                  "flash": result.flash}))
"""


def prompts(model: Path, n: int) -> dict[str, list[int]]:
    with open_container(model) as container:
        n_vocab = container.config["vocab_size"]
    rng, half = np.random.default_rng(1), n_vocab // 2
    return {name: (rng.integers(3, half, n) + half * i).tolist() for i, name in enumerate(HALVES)}


def recurring(picks: list[list[list[int]]], n_layers: int) -> dict[int, float]:
    """lag -> share of picks that the `lag` tokens before had too; decode only, mean over layers."""
    layers = [[set(p[0]) for p in picks[i::n_layers] if len(p) == 1] for i in range(n_layers)]
    found = {}
    for lag in LAGS:
        shares = [
            len(now & set().union(*layer[t - lag : t])) / len(now)
            for layer in layers
            for t, now in enumerate(layer)
            if t >= lag
        ]
        found[lag] = statistics.mean(shares)
    return found


def cell(model: Path, cap: int, prompt: list[int], args: argparse.Namespace) -> dict:
    command = [sys.executable, "-c", CHILD, str(model), str(cap), ",".join(map(str, prompt)),
               str(args.tokens)]  # fmt: skip
    done = run_confined(command, group_bytes=cap, files=[model], timeout_s=args.timeout)
    if done.code:
        return {"failed": done.code, "err": done.err[-500:], "charges": asdict(done.charges)}
    seen = json.loads(done.out)
    with open_container(model) as container:
        n_layers = container.config["n_layers"]
    flash = seen["flash"]
    return {
        "tokens_per_s": seen["timings"]["predicted_per_second"],
        "prompt_per_second": seen["timings"]["prompt_per_second"],
        "per_token_ms": seen["timings"].get("per_token_ms"),
        "recurring": recurring(seen["picks"], n_layers),
        "bytes_per_token": flash["bytes_per_token"], "reads_per_token": flash["reads_per_token"],
        "floor_ms": flash["floor_ms"], "hit_rate": flash["hit_rate"],
        "limit_hits": flash["limit_hits"], "charges": asdict(done.charges),
        "tokens": seen["tokens"],
    }  # fmt: skip


def one_round(args: argparse.Namespace) -> None:
    size, rows = args.model.stat().st_size, []
    for name, prompt in prompts(args.model, args.prompt).items():
        for text in args.caps.split(","):
            cap = parse_size(text, whole_bytes=size)
            row = {"routing": name, "cap": text, "cap_bytes": cap,
                   **cell(args.model, cap, prompt, args)}  # fmt: skip
            rows.append(row)
            print(name, text, row.get("tokens_per_s", row.get("err")), flush=True)
    runs = json.loads(args.runs.read_text()) if args.runs.exists() else {"rounds": []}
    runs |= {"model": args.model.name, "bytes": size, "note": args.note,
             "n_prompt": args.prompt, "n_tokens": args.tokens}  # fmt: skip
    runs["rounds"].append(rows)
    args.runs.write_text(json.dumps(runs))


def table(runs: dict) -> str:
    head = ("routing | cap | tok/s (all rounds) | picks recurring 1 / 4 / 8 | MiB/token | "
            "reads/token | hits | flash floor ms | share of flash floor | peak MiB | limit hits | "
            "tokens")  # fmt: skip
    lines = [
        f"# {runs['model']}", "",
        f"{runs['note']}  {runs['bytes'] / MIB:.0f} MiB; prompt of {runs['n_prompt']}, "
        f"{runs['n_tokens']} tokens decoded greedily; {len(runs['rounds'])} rounds interleaved; "
        "`bench/moe_routing.py`: a memory cgroup of exactly the cap, cold, O_DIRECT.  Floor: the "
        "reads that occurred, priced by the curve probed in that process; share: floor over the "
        "token's time, the median of the rounds.  Tokens are compared with those at the first cap.",
        "", f"| {head} |", "|" + " --- |" * len(head.split("|")),
    ]  # fmt: skip
    first: dict[str, list[int]] = {}
    for k, row in enumerate(runs["rounds"][0]):
        same = [rows[k] for rows in runs["rounds"]]
        ran = [one for one in same if "failed" not in one]
        if not ran:
            lines.append(f"| {row['routing']} | {row['cap']} | failed {len(same)}x |")
            continue
        expected = first.setdefault(row["routing"], ran[0]["tokens"])
        share = [one["floor_ms"]["flash"] * one["tokens_per_s"] / 1e3 for one in ran]
        speeds = [one["tokens_per_s"] for one in ran]
        lags = " / ".join(f"{100 * v:.0f} %" for v in ran[0]["recurring"].values())
        lines.append(
            f"| {row['routing']} | {row['cap']} | {statistics.median(speeds):.2f} "
            f"({', '.join(f'{speed:.2f}' for speed in speeds)}) | {lags} | "
            f"{middle(ran, 'bytes_per_token') / MIB:.1f} | {middle(ran, 'reads_per_token'):.0f} | "
            f"{100 * middle(ran, 'hit_rate'):.0f} % | "
            f"{statistics.median(one['floor_ms']['flash'] for one in ran):.0f} | "
            f"{statistics.median(share):.2f} | "
            f"{max(one['charges']['peak_bytes'] for one in ran) / MIB:.0f} | "
            f"{sum(one['limit_hits'] or 0 for one in ran)} | "
            f"{'same' if all(one['tokens'] == expected for one in ran) else 'DIFFER'} |"
        )
    return "\n".join(lines) + "\n"


def middle(rows: list[dict], name: str) -> float:
    return statistics.median(row[name] or 0 for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    sub = verbs.add_parser("round")
    sub.add_argument("model", type=Path)
    sub.add_argument("--runs", type=Path, required=True)
    sub.add_argument("--caps", default="100%,50%,25%")
    sub.add_argument("--prompt", type=int, default=16)
    sub.add_argument("--tokens", type=int, default=33)
    sub.add_argument("--timeout", type=float, default=180)
    sub.add_argument("--note", default="")
    sub = verbs.add_parser("card")
    sub.add_argument("out", type=Path, help="without suffix")
    sub.add_argument("--runs", type=Path, required=True)
    args = parser.parse_args()
    if args.verb == "round":
        one_round(args)
        return
    runs = json.loads(args.runs.read_text())
    args.out.with_suffix(".json").write_text(json.dumps(runs))
    args.out.with_suffix(".md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
