"""Approximate mode against exact mode at a cap that does not hold the deciding matrix.

    python bench/approx.py WORKDIR --text books-valid.txt --prepare  # once; 6 GiB of files
    python bench/approx.py WORKDIR --text books-valid.txt --out bench/results/approx-45
    python bench/approx.py WORKDIR …  --more                             # another repeat, same card
    python bench/approx.py WORKDIR … --apart --out bench/results/approx-45-apart

The model is the bundled one inflated to 1 GiB: jittered copies, neurons and channels in random
order, attention a third of the weights.  Copies of a neuron fire together, which flatters every
order by co-activation; with --apart they do not (conversion/inflate.py).  Order and predictors are
fitted on the text's start; the prompt is taken from far behind it.  Predictors are fitted once, to
the random order, and carried to the others (carry_fit.py).  Every cell is a fresh process in a
memory cgroup of exactly the cap with a cold page cache (mincore); cells are interleaved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cards import write_card  # noqa: E402
from carry_fit import carry  # noqa: E402
from frontier import machine, run_cell  # noqa: E402

from flashllm import LLM, __version__  # noqa: E402
from flashllm.bundled import bundled_model  # noqa: E402
from flashllm.conversion.convert import convert  # noqa: E402
from flashllm.conversion.inflate import InflatedCheckpoint, Inflation  # noqa: E402
from flashllm.conversion.opening import open_source  # noqa: E402
from flashllm.units import MIB, parse_size  # noqa: E402

# Sixteen times the bundled model's layers would be narrow; ten times its width and twice its depth
# keep the proportions of a real one.
INFLATION = Inflation(channels=10, neurons=10, kv_groups=26, extra_layers=6)
TRACE_TOKENS, FIT_TOKENS = 768, 4096
PROMPT_AT, PROMPT_TOKENS = 1_500_000, 12  # characters into the text; tokens
APPROX = ["--mode", "approx"]
# label -> (layout, arguments); a number: bundles per frame, else the container's default
CELLS = {
    "exact, random order": ("split-random", []),
    "exact, fitted order": ("split-fitted", []),
    "approx, random order": ("all-random", APPROX),
    "approx, fitted order": ("all-fitted", APPROX),
    "approx, fitted order, no audit": ("all-fitted", [*APPROX, "--audit", "0"]),
    "approx, fitted order, frames of 4, no audit": ("all-fitted-4", [*APPROX, "--audit", "0"]),
    "exact, fitted order, frames of 1": ("split-fitted-1", []),
    "exact, fitted order, lru": ("split-fitted", ["--policy", "lru"]),
    "exact, fitted order, lfu": ("split-fitted", ["--policy", "lfu"]),
}
BASE = "exact, fitted order"
ABOUT = {
    False: "**Copies of a neuron fire together**: an order by co-activation finds them, and looks "
    "better here than on a real large model.",
    True: "**Copies of a neuron do not fire together**: two of ten carry it, the others are decoys "
    "that fire as often as real neurons, two by two.",
}


def file_of(work: Path, apart: bool, layout: str) -> Path:
    return work / f"{'apart' if apart else 'together'}-{layout}.flash"


def prepare(work: Path, text: Path, recall: float, apart: bool) -> None:
    """The containers, the trace of the first, and fits of those that decode approximately."""
    made = {name: file_of(work, apart, name) for name, _ in CELLS.values()}
    first, trace = made["split-random"], file_of(work, apart, "fit").with_suffix(".fltrace")
    if not first.exists():
        with open_source(bundled_model()) as source:
            inflated = InflatedCheckpoint(source, replace(INFLATION, apart=apart))
            convert(inflated, first, quant="int8", codec="raw")
    verb(["trace", first, "--text", text, "--tokens", TRACE_TOKENS, "--window", 256], trace)
    every, order, single = ["--bundle", "all"], ["--trace", trace], ["--per-frame", 1]
    verb(["relayout", first, *order, "--per-frame", 8], made["split-fitted"])
    verb(["relayout", first, *every, *single], made["all-random"])
    verb(["relayout", first, *order, *every, *single], made["all-fitted"])
    verb(["relayout", made["all-fitted"], "--bundle", "split", *single], made["split-fitted-1"])
    verb(["relayout", made["all-fitted"], "--per-frame", 4], made["all-fitted-4"])
    fit = Path(f"{made['all-random']}.fit")
    verb(["fit", made["all-random"], "--text", text, "--recall", recall, "--tokens", FIT_TOKENS],
         fit)  # fmt: skip
    for name in ("all-fitted", "all-fitted-4"):
        if not Path(f"{made[name]}.fit").exists():
            carry(made["all-random"], made[name])


def verb(words: list, out: Path) -> None:
    """A verb of the command line that writes `out`, unless it is there."""
    if out.exists():
        return
    given = [] if words[0] == "fit" else ["-o", out]
    subprocess.run([sys.executable, "-m", "flashllm", *map(str, [*words, *given])], check=True)


def prompt_ids(model: Path, text: Path) -> list[int]:
    with LLM(str(model), n_context=64) as llm:
        part = text.read_text(encoding="utf-8")[PROMPT_AT : PROMPT_AT + 20 * PROMPT_TOKENS]
        return llm.encode(part)[:PROMPT_TOKENS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="a folder with 5 GiB of room")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--recall", type=float, default=0.99)
    parser.add_argument("--cap", default="45%")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--apart", action="store_true", help="copies that do not co-fire")
    parser.add_argument("--cells", help="only those (labels with | between), and exact mode in "
                        "fitted order, to which ratios are")
    parser.add_argument("--prepare", action="store_true", help="make the files and end")
    parser.add_argument("--more", action="store_true", help="add repeats to the card")
    parser.add_argument("--out", type=Path, help="card without suffix")
    args = parser.parse_args()
    if args.prepare:
        prepare(args.work, args.text, args.recall, args.apart)
        return 0
    cells = {
        label: (file_of(args.work, args.apart, name), extra)
        for label, (name, extra) in CELLS.items()
        if args.cells is None or label in (BASE, *args.cells.split("|"))
    }
    base = cells[BASE][0]
    cap = parse_size(args.cap, whole_bytes=base.stat().st_size)
    prompt = prompt_ids(base, args.text)
    settings = ["--n-context", "128", "--prefill-chunk", "12", "--storage", "direct",
                "--temperature", "0.8", "--seed", "1"]  # fmt: skip
    card_path, about = args.out.with_suffix(".json"), machine(base)
    runs: dict[str, list[dict]] = {}
    if args.more:
        runs = json.loads(card_path.read_text())["runs"]
    first = 1 + max((run["repeat"] for some in runs.values() for run in some), default=-1)
    for repeat in range(first, first + args.repeats):
        for label, (model, extra) in cells.items():
            needs = [model, *([Path(f"{model}.fit")] if extra else [])]
            if not all(path.exists() for path in needs):
                print(f"left out, not prepared: {label}", flush=True)
                continue
            if extra:
                extra = [*extra, "--recall", str(args.recall)]
            run = run_cell(model, cap, args.tokens, [*settings, *extra], prompt)
            runs.setdefault(label, []).append({**run, "repeat": repeat})
            speed = run.get("tokens_per_s")
            print(repeat, label, run.get("stderr", "")[-500:] if speed is None else speed,
                  flush=True)  # fmt: skip
        write(args, cap, runs, about)  # what is there stays, whatever happens to the next
    print(args.out.with_suffix(".md").read_text())
    return 0


def write(args: argparse.Namespace, cap: int, runs: dict, about: dict) -> None:
    card = {
        "command": " ".join(Path(word).name if "/" in word else word for word in sys.argv),
        "flashllm": __version__, "apart": args.apart,
        "cap": args.cap,
        "cap_bytes": cap, "tokens": args.tokens, "recall": args.recall,
        "machine": about, "runs": runs,
        "rows": [row(label, runs, args.tokens) for label in CELLS if label in runs],
    }  # fmt: skip
    write_card(args.out, card, table(card))


def row(label: str, runs: dict[str, list[dict]], n_tokens: int) -> dict:
    """Medians of a cell; ratios to the exact mode's inside each repeat, then the median."""
    bases = {base["repeat"]: base for base in runs[BASE]}
    done = [(run, bases[run["repeat"]]) for run in runs[label]
            if "flash" in run and "flash" in bases[run["repeat"]]]  # fmt: skip
    if not done:
        return {"label": label, "failed": len(runs[label])}
    steps = n_tokens - 1  # the first token is the prompt's
    flash = [run["flash"] for run, _ in done]

    def middle(name: str, by: float = 1.0) -> float | None:
        values = [one[name] for one in flash if one[name] is not None]
        return statistics.median(values) / by if values else None

    return {
        "label": label,
        "tokens_per_s": statistics.median(run["tokens_per_s"] for run, _ in done),
        "all_tokens_per_s": [run["tokens_per_s"] for run, _ in done],
        "speed_over_exact": statistics.median(
            run["tokens_per_s"] / base["tokens_per_s"] for run, base in done
        ),
        "bytes_over_exact": statistics.median(
            run["flash"]["decode_bytes_read"] / base["flash"]["decode_bytes_read"]
            for run, base in done
        ),
        "mib_per_token": middle("decode_bytes_read", steps * MIB),
        "reads_per_token": middle("decode_reads", steps),
        "audit_mib": middle("audit_bytes", MIB),
        "read_share": sum(f["read_bundles"] for f in flash) / sum(f["all_bundles"] for f in flash),
        "predicted_share": sum(f["predicted_bundles"] for f in flash)
        / sum(f["all_bundles"] for f in flash),
        "active_share": sum(f["active_bundles"] for f in flash)
        / sum(f["all_bundles"] for f in flash),
        "read_bundles": flash[0]["read_bundles"],
        "all_bundles": flash[0]["all_bundles"],
        "recall": middle("recall"),
        "precision": middle("precision"),
        "peak_cgroup_mib": max(run["charges"]["peak_bytes"] for run, _ in done) / MIB,
        "limit_hits": sum(run["flash"]["limit_hits"] or 0 for run, _ in done),
        "oom_kills": sum(run["charges"]["oom_kills"] for run, _ in done),
    }


def table(card: dict) -> str:
    def percent(value: float | None, digits: int = 0) -> str:
        return "-" if value is None else f"{100 * value:.{digits}f} %"

    head = ("mode, order | tok/s (each run) | x exact | MiB/token | x exact | reads/token | "
            "bundles read of all | predicted | active | recall | precision | audit MiB | "
            "peak MiB | limit hits")  # fmt: skip
    cap = card["cap_bytes"] / MIB
    lines = [
        "# Approximate mode at a cap that does not hold the deciding matrix", "",
        "The bundled squared-ReLU model inflated to 1.05 GiB (int8, jittered copies, channels and "
        "neurons in random order, attention a third). " + ABOUT[card["apart"]],
        f"Cap {card['cap']} of the file = {cap:.0f} MiB, a memory cgroup of exactly that size, "
        f"cold page cache; {card['tokens']} tokens sampled with one seed after a prompt of "
        f"{PROMPT_TOKENS}; order and predictors fitted on other text, asked recall "
        f"{card['recall']}. Exact mode reads split containers, approximate mode bundles that hold "
        "everything. Ratios are to exact mode in fitted order, inside each repeat, then the "
        "median; time includes audits where there are any, bytes do not. Bytes, reads and bundles "
        "are of decoding.", "",
        f"`{card['command']}`", "",
        *(f"- {key}: {value}" for key, value in card["machine"].items()), "",
        f"| {head} |", "|" + " --- |" * len(head.split("|")),
    ]  # fmt: skip
    for r in card["rows"]:
        if "failed" in r:
            lines.append(f"| {r['label']} | failed {r['failed']}x |")
            continue
        each = ", ".join(f"{speed:.2f}" for speed in r["all_tokens_per_s"])
        read = f"{percent(r['read_share'], 1)} ({r['read_bundles']:,} of {r['all_bundles']:,})"
        lines.append(
            f"| {r['label']} | {r['tokens_per_s']:.2f} ({each}) | {r['speed_over_exact']:.2f} | "
            f"{r['mib_per_token']:.0f} | {r['bytes_over_exact']:.2f} | "
            f"{r['reads_per_token']:.0f} | {read} | {percent(r['predicted_share'], 1)} | "
            f"{percent(r['active_share'], 1)} | {percent(r['recall'], 1)} | "
            f"{percent(r['precision'])} | {r['audit_mib']:.0f} | {r['peak_cgroup_mib']:.0f} | "
            f"{r['limit_hits']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
