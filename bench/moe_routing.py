"""Mixture of experts under a cap, with routing that repeats itself and with routing that does not.

    python bench/moe_routing.py prepare MODEL.flash --runs FILE.json [where peers are]
    python bench/moe_routing.py round   MODEL.flash --runs FILE.json [where peers are]
    python bench/moe_routing.py card bench/results/NAME --runs FILE.json …

For containers made of random_olmoe.py's checkpoints, where the half of the vocabulary that a prompt
comes from decides which of both.  A round runs every cell once: a fresh process in a memory group
of exactly the cap, cold, greedy.  `--cells 50%:ours,ours+policy=lfu,llama.cpp-128k`: ours, ours
with a setting, a peer of peers/ on a file made from the container's weights (`prepare`, once).
Such a model's layers add little to the residual, so that look-ahead by the next router is nearly
always right; `ours+look_ahead=1+blunt=1.0` adds noise of that deviation to what the guess sees.
Every cell is written down when it has run; a round that was cut off counts as far as it got.

A cell of ours says how routing really was (which share of a token's experts was among those of the
token before, of the 4 and of the 8 before it), which bytes and reads a token missed, and the flash
floor: what the device asks for just those reads.  The device is probed for a second before and
after the cell, and each point's best counts: the third of a second in which an engine probes for
its own use may fall into a slow spell, and would flatter it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import peers
from cards import write_card
from confined import run_confined
from peers.base import Job

from flashllm.container import open_container
from flashllm.errors import UnsupportedError
from flashllm.probe.curve import best_curve
from flashllm.probe.device import probe_device
from flashllm.settings import SETTINGS
from flashllm.units import MIB, parse_size

HALVES = ("chance", "recurring")
LAGS = (1, 4, 8)
CELLS = ["100%:ours", "50%:ours,llama.cpp-128k", "25%:ours,llama.cpp-128k"]
PROBE_S = 0.7
N_CONTEXT = 256  # as peers get for so few tokens
CHILD = """
import json, sys
import numpy as np
import flashllm.models.moe as moe
from flashllm import LLM
picks, plain = [], moe.route
def route(scores, n_chosen, **options):
    chosen, weights = plain(scores, n_chosen, **options)
    picks.append(chosen.tolist())
    return chosen, weights
moe.route = route
model, budget, prompt, tokens = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
rng, blunt = np.random.default_rng(2), float(sys.argv[6])
guesses, guess, came = [0, 0], moe.LookAhead.guess, moe.LookAhead.came
def guessed(self, layer, x, ahead, plain=moe.MoEModel._look_ahead):
    before = len(picks)
    plain(self, layer, x + blunt * rng.standard_normal(x.shape, np.float32), ahead)
    del picks[before:]  # it routes, too
def counted(self, layer, experts):
    found = np.isin(self._guessed.get(layer, ()), experts)
    guesses[0] += int(found.sum())
    guesses[1] += found.size
    came(self, layer, experts)
moe.MoEModel._look_ahead, moe.LookAhead.came = guessed, counted
with LLM(model, ram_budget=budget, storage="direct", n_context=int(sys.argv[5])) as llm:
    ids = [int(word) for word in prompt.split(",")]
    result = llm.generate(ids, max_tokens=tokens, temperature=0.0, ignore_eos=True)
    ahead = llm.store.statistics()
print(json.dumps({"picks": picks, "tokens": result.tokens, "timings": result.timings,
                  "flash": result.flash, "guesses": guesses, "ahead": [ahead.prefetch_bytes,
                  ahead.prefetch_reads, ahead.prefetch_unused_bytes]}))
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


def ours(model: Path, job: Job, setting: str) -> dict:
    """One run of ours; `setting`: "name=value", several with + between, or nothing."""
    wanted = dict(one.split("=") for one in setting.split("+") if one)
    blunt = wanted.pop("blunt", "0")
    env = {**os.environ, **{SETTINGS[name].variable: value for name, value in wanted.items()}}
    command = [sys.executable, "-c", CHILD, str(model), str(job.cap),
               ",".join(map(str, job.prompt)), str(job.tokens), str(N_CONTEXT), blunt]  # fmt: skip
    curves = [probe_device(model, "direct", seconds=PROBE_S)]
    done = run_confined(
        command, group_bytes=job.cap, files=[model], timeout_s=job.timeout_s, env=env
    )
    curves.append(probe_device(model, "direct", seconds=PROBE_S))
    if done.code:
        return {"state": "failed", "why": done.err[-500:], "charges": asdict(done.charges)}
    seen = json.loads(done.out)
    with open_container(model) as container:
        n_layers = container.config["n_layers"]
    flash, n = seen["flash"], job.tokens - 1
    ahead, ahead_reads, unused = (figure / n for figure in seen["ahead"])
    n_bytes, reads = flash["bytes_per_token"] + ahead, flash["reads_per_token"] + ahead_reads
    curve = best_curve(curves)
    return {
        "state": "ran",
        "tokens_per_s": seen["timings"]["predicted_per_second"],
        "prefill_tokens_per_s": seen["timings"]["prompt_per_second"],
        "per_token_ms": seen["timings"].get("per_token_ms"),
        "recurring": recurring(seen["picks"], n_layers),
        "decode_bytes_per_token": n_bytes, "reads_per_token": reads,
        "ahead_bytes_per_token": ahead, "ahead_unused_bytes_per_token": unused,
        "guesses": seen["guesses"], "hit_rate": flash["hit_rate"],
        "limit_hits": flash["limit_hits"],
        "floor_ms": 1e3 * curve.seconds(reads, n_bytes / reads) if reads else 0.0,
        "device_bytes_per_s": curve.bytes_per_s(n_bytes / reads) if reads else None,
        "curve": asdict(curve), "dram_floor_ms": flash["floor_ms"].get("dram"),
        "charges": asdict(done.charges), "tokens": seen["tokens"],
    }  # fmt: skip


def cells(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(routing, cap, who) in the order of a round."""
    found = [cell.partition(":") for cell in args.cells]
    return [(half, cap, who) for half in args.routing.split(",") for cap, _, names in found
            for who in names.split(",")]  # fmt: skip


def prepared(args: argparse.Namespace) -> dict[str, tuple]:
    """Peer's key -> (peer, its file), or (peer, None) and why there is none."""
    found = {}
    for _, _, who in cells(args):
        if who.partition("+")[0] == "ours" or who in found:
            continue
        peer = peers.make(who, args)
        folder = args.runs.resolve().parent
        why, file = peers.trouble(peer, folder), None
        if why is None:
            try:
                file = peer.prepare(args.model, folder)
            except (UnsupportedError, RuntimeError) as error:
                why = str(error)
        found[who] = peer, file, why
    return found


def one_round(args: argparse.Namespace) -> None:
    size, rows, others = args.model.stat().st_size, [], prepared(args)
    halves = prompts(args.model, args.prompt)
    runs = json.loads(args.runs.read_text()) if args.runs.exists() else {"rounds": []}
    runs |= {"model": args.model.name, "bytes": size, "note": args.note,
             "n_prompt": args.prompt, "n_tokens": args.tokens}  # fmt: skip
    runs["rounds"].append(rows)
    for half, text, who in cells(args):
        cap = parse_size(text, whole_bytes=size)
        name, _, setting = who.partition("+")
        n = args.tokens if name == "ours" else args.crawl_tokens
        job = Job(halves[half], n, args.threads, cap, True, args.timeout)
        if name == "ours":
            seen = ours(args.model, job, setting)
        else:
            peer, file, why = others[who]
            seen = {"state": "missing", "why": why}
            if file is not None:
                seen = peers.measure(peer, file, job) | {"peer": peer.name}
        rows.append({"routing": half, "cap": text, "who": who, "cap_bytes": cap, **seen})
        args.runs.write_text(json.dumps(runs))
        print(half, text, who, seen.get("tokens_per_s", seen.get("why")), flush=True)


HEAD = (
    "routing", "cap", "who", "tok/s (all rounds)", "ours / it", "picks recurring 1 / 4 / 8",
    "MiB/token", "reads/token", "hits", "flash floor ms", "share of floor", "wait ms", "peak MiB",
    "limit hits", "tokens", "guesses right",
)  # fmt: skip


def table(runs: dict) -> str:
    every = [row for rows in runs["rounds"] for row in rows]
    n_rounds = max(Counter(map(key_of, every)).values())
    lines = [
        f"# {runs['model']}", "",
        f"{runs['note']}  {runs['bytes'] / MIB:.0f} MiB; prompt of {runs['n_prompt']}, "
        f"{runs['n_tokens']} tokens decoded greedily; {n_rounds} rounds interleaved.  "
        "`bench/moe_routing.py`: a process per cell in a memory cgroup of exactly the cap, cold.  "
        "Floor: the reads that occurred at the best cost probed around that run; share: floor over "
        "the token's time; `ours / it`: in the same round; medians.  Tokens of ours are compared "
        "with those of its first cell.",
        "", "| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD),
    ]  # fmt: skip
    first: dict[str, list[int]] = {}
    for key in sorted_keys(every):
        found = [row_of(rows, key) for rows in runs["rounds"]]
        ran = [row for row in found if row and row["state"] == "ran"]
        if not ran:
            why = next((row.get("why", "") for row in found if row), "")
            state = next(row["state"] for row in found if row)
            lines.append("| " + " | ".join([*key, state, why]) + " |")
            continue
        own = key[2].startswith("ours")
        base = [row_of(rows, (*key[:2], "ours")) for rows in runs["rounds"]]
        ratios = [one["tokens_per_s"] / row["tokens_per_s"] for one, row in
                  zip(base, found, strict=True) if one and row and "tokens_per_s" in row
                  and "tokens_per_s" in one]  # fmt: skip
        speeds = [row["tokens_per_s"] for row in ran]
        line = [
            key[0], key[1], ran[0].get("peer", key[2]),
            f"{statistics.median(speeds):.2f} ({', '.join(f'{speed:.2f}' for speed in speeds)})",
            f"{statistics.median(ratios):.2f}" if ratios and key[2] != "ours" else "",
        ]  # fmt: skip
        mib = f"{middle(ran, 'decode_bytes_per_token') / MIB:.0f}"
        peak = f"{max(row['charges']['peak_bytes'] for row in ran) / MIB:.0f}"
        if own:
            expected = first.setdefault(key[0], ran[0]["tokens"])
            shares = [row["floor_ms"] * row["tokens_per_s"] / 1e3 for row in ran]
            line += [
                " / ".join(f"{100 * v:.0f} %" for v in ran[0]["recurring"].values()), mib,
                f"{middle(ran, 'reads_per_token'):.0f}", f"{100 * middle(ran, 'hit_rate'):.0f} %",
                f"{middle(ran, 'floor_ms'):.0f}", f"{statistics.median(shares):.2f}",
                f"{statistics.median(row['per_token_ms']['wait'] for row in ran):.0f}", peak,
                str(sum(row["limit_hits"] or 0 for row in ran)),
                "same" if all(row["tokens"] == expected for row in ran) else "DIFFER",
                right_share(ran),
            ]  # fmt: skip
        else:
            line += ["", mib, "", "", "", "", "", peak, str(ran[0]["charges"]["failcnt"]), "", ""]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def sorted_keys(rows: list[dict]) -> list[tuple[str, str, str]]:
    """(routing, cap, who) of all rows: as they came, routings and caps together."""
    keys = list(dict.fromkeys(map(key_of, rows)))
    caps = list(dict.fromkeys(cap for _, cap, _ in keys))
    return sorted(keys, key=lambda key: (HALVES.index(key[0]), caps.index(key[1])))


def right_share(rows: list[dict]) -> str:
    right, of = (sum(row["guesses"][i] for row in rows) for i in (0, 1))
    return f"{100 * right / of:.0f} %" if of else ""


def row_of(rows: list[dict], key: tuple[str, str, str]) -> dict | None:
    return next((row for row in rows if key_of(row) == key), None)


def key_of(row: dict) -> tuple[str, str, str]:
    return row["routing"], row["cap"], row["who"]


def middle(rows: list[dict], name: str) -> float:
    return statistics.median(row[name] or 0 for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("prepare", "round"):
        sub = verbs.add_parser(verb)
        sub.add_argument("model", type=Path)
        sub.add_argument("--runs", type=Path, required=True, help="peers' files lie beside it")
        sub.add_argument("--cells", nargs="+", default=CELLS)
        sub.add_argument("--routing", default=",".join(HALVES))
        sub.add_argument("--prompt", type=int, default=16)
        sub.add_argument("--tokens", type=int, default=33)
        sub.add_argument("--crawl-tokens", type=int, default=9, help="of peers")
        sub.add_argument("--threads", type=int, default=2)
        sub.add_argument("--timeout", type=float, default=180)
        sub.add_argument("--note", default="")
        peers.add_arguments(sub)
    sub = verbs.add_parser("card")
    sub.add_argument("out", type=Path, help="without suffix")
    sub.add_argument("--runs", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    if args.verb == "prepare":
        print({who: str(file or why) for who, (_, file, why) in prepared(args).items()})
    elif args.verb == "round":
        one_round(args)
    else:
        runs = [json.loads(file.read_text()) for file in args.runs]
        write_card(args.out, {"models": runs}, "\n".join(map(table, runs)))
        print(args.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
