"""Tokens per second against the RAM cap, ours and the naive mode interleaved in one run.

    python bench/frontier.py MODEL.flash … --caps 100%,50%,25% --repeats 3 --out bench/results/X

Every cell is a fresh process in a memory cgroup of exactly the cap, with a cold page cache (checked
with mincore), greedy, the same prompt ids and token count.  Cells are interleaved: all cells once,
then all again.  The naive mode keeps no weight and streams all of them for every token in large
overlapped direct reads.  The card holds raw numbers; README quotes medians from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cards import write_card  # noqa: E402
from confined import run_confined  # noqa: E402

from flashllm import __version__, assembly  # noqa: E402
from flashllm.probe.device import choose_storage  # noqa: E402
from flashllm.stress.confine import cached_bytes  # noqa: E402
from flashllm.units import MIB, parse_size  # noqa: E402

PROMPT = [1, 5, 9, 20, 33, 7, 42, 11]


def run_cell(
    model: Path, cap: int, tokens: int, extra: list[str], prompt: list[int] = PROMPT
) -> dict:
    """One process under a kernel limit; its own JSON and the kernel's numbers."""
    command = [
        sys.executable, "-m", "flashllm", "generate", str(model), "--json", "--ignore-eos",
        "--token-ids", ",".join(map(str, prompt)), "--max-tokens", str(tokens),
        "--temperature", "0", "--ram-budget", str(cap), *extra,
    ]  # fmt: skip
    done = run_confined(command, group_bytes=cap, files=[model])
    charges = asdict(done.charges)
    if done.code:
        return {"failed": done.code, "stderr": done.err[-2000:], "charges": charges}
    result = json.loads(done.out)
    return {
        "tokens_per_s": result["timings"]["predicted_per_second"],
        "prompt_ms": result["timings"]["prompt_ms"],
        "load_ms": result["timings"]["load_ms"],
        "tokens": result["tokens"],
        "flash": result["flash"],
        "charges": charges,
        "device_bytes": done.device_bytes,
        "cached_bytes_after": cached_bytes(model),
    }


def streamed_bytes(model: Path, cap: int, extra: list[str]) -> tuple[int, int]:
    """(bytes the ledger says must stream per token, bytes of all streamable weights)."""
    some = assembly.estimate(str(model), ram_budget=cap)
    everything = assembly.estimate(str(model), ram_budget=cap, pin=False)
    return some.plan.streamed_bytes, everything.plan.streamed_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--caps", default="100%,50%,25%")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--also", default="mmap", help="other backends, at 50 %%")
    parser.add_argument("--peer", type=Path, help="JSON of transformers_in_memory.py")
    parser.add_argument("--out", type=Path, required=True, help="card without suffix")
    parser.add_argument("--note", default="", help="a line for the card: what the models are")
    args = parser.parse_args()
    cells = []
    for model in args.models:
        size = model.stat().st_size
        half = parse_size("50%", whole_bytes=size)
        for cap in args.caps.split(","):
            cells.append((model, cap, parse_size(cap, whole_bytes=size), ["--storage", "direct"]))
        for storage in filter(None, args.also.split(",")):
            cells.append((model, f"50% {storage}", half, ["--storage", storage]))
        cells.append((model, "naive", half, ["--storage", "direct", "--no-pin"]))
    runs: dict[tuple, list[dict]] = {}
    for repeat in range(args.repeats):
        for model, label, cap, extra in cells:
            cell = run_cell(model, cap, args.tokens, extra)
            runs.setdefault((model.name, label), []).append(cell)
            speed = cell.get("tokens_per_s")
            print(f"{repeat} {model.name:<24} {label:<6} "
                  f"{'failed' if speed is None else f'{speed:.3f} tok/s'}", flush=True)
    rows = [summarise(model, label, cap, runs, args.tokens) for model, label, cap, _ in cells]
    card = {
        "command": " ".join(sys.argv), "flashllm": __version__, "note": args.note,
        "machine": machine(args.models[0]), "rows": rows,
        "transformers_in_memory": json.loads(args.peer.read_text()) if args.peer else None,
        "runs": {f"{model} {label}": cells for (model, label), cells in runs.items()},
    }  # fmt: skip
    write_card(args.out, card, table(card))
    print(table(card))
    return 0


def summarise(model: Path, label: str, cap: int, runs: dict, n_tokens: int) -> dict:
    """Medians of a cell beside the floor of the device and the bound against the naive mode."""
    done = [run for run in runs[model.name, label] if "tokens_per_s" in run]
    if not done:
        return {"model": model.name, "cap": label, "failed": len(runs[model.name, label])}
    naive = [r["tokens_per_s"] for r in runs[model.name, "naive"] if "tokens_per_s" in r]
    must, everything = streamed_bytes(model, cap, [])
    if label == "naive":
        must = everything
    speed = statistics.median(run["tokens_per_s"] for run in done)
    # Ratio inside each repeat, then the median: the disk has slow spells of minutes.
    paired = [n / run["tokens_per_s"] for n, run in zip(naive, done, strict=False)]
    row = {
        "model": model.name,
        "cap": label,
        "cap_bytes": cap,
        "tokens_per_s": speed,
        "all_tokens_per_s": [run["tokens_per_s"] for run in done],
        "device_mib_per_token": statistics.median(
            run["flash"]["bytes_read"] / n_tokens / MIB for run in done
        ),
        "must_stream_share": must / everything,
        "time_over_naive": statistics.median(paired),
        "bound_over_naive": 1.1 * must / everything,
        "peak_cgroup_mib": max(run["charges"]["peak_bytes"] for run in done) / MIB,
        "oom_kills": sum(run["charges"]["oom_kills"] for run in done),
        "limit_hits": sum(run["flash"]["limit_hits"] or 0 for run in done),
        # Loading and the probe read too, so the counter is above what the request read.
        "device_over_bytes_read": statistics.median(
            run["device_bytes"] / max(1, run["flash"]["bytes_read"]) for run in done
        ),
        "same_tokens": len({tuple(run["tokens"]) for run in done}) == 1,
    }
    curve = choose_storage(str(model)).curve
    row["flash_floor_ms"] = 1e3 * must / curve.sequential_bytes_per_s
    return row


def machine(model: Path) -> dict:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().split("\n")
                if line.startswith("model name")), platform.processor())
    choice = choose_storage(str(model))
    return {
        "cpu": cpu, "kernel": platform.release(), "storage": choice.name, "why": choice.why,
        "sequential_bytes_per_s": choice.curve.sequential_bytes_per_s,
    }  # fmt: skip


def table(card: dict) -> str:
    head = ("model | cap | tok/s | MiB/token | must stream | time / naive | bound | "
            "flash floor ms | peak MiB | limit hits")
    lines = [f"{card['note']}", "", f"`{card['command']}`", "",
             *(f"- {key}: {value}" for key, value in card["machine"].items()), "",
             f"| {head} |", "|" + " --- |" * len(head.split("|"))]
    for row in card["rows"]:
        if "failed" in row:
            lines.append(f"| {row['model']} | {row['cap']} | failed {row['failed']}x |")
            continue
        lines.append(
            f"| {row['model']} | {row['cap']} | {row['tokens_per_s']:.2f} | "
            f"{row['device_mib_per_token']:.1f} | {100 * row['must_stream_share']:.0f} % | "
            f"{row['time_over_naive']:.2f} | {row['bound_over_naive']:.2f} | "
            f"{row['flash_floor_ms']:.0f} | {row['peak_cgroup_mib']:.0f} | "
            f"{row['limit_hits']} |"
        )
    if card["transformers_in_memory"]:
        peer = card["transformers_in_memory"]
        lines += ["", f"transformers, bf16, all in memory, no cap: {peer['tokens_per_s']:.2f} "
                      f"tok/s ({peer['parameters'] / 1e9:.2f} B parameters)"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
