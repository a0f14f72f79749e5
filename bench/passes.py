"""What sharing a pass over streamed weights brings: prompts together, drafts, a long prompt.

    flashllm inflate CHECKPOINT silu.flash --size 1GiB --quant int8 --codec raw
    python bench/passes.py together silu.flash relu.flash --out bench/results/together-50
    python bench/passes.py drafts   silu.flash relu.flash --out bench/results/drafts-50
    python bench/passes.py prefill  silu.flash relu.flash --out bench/results/prefill-50
    …  --more                                              # further repeats, same card

Every cell is a fresh process of `flashllm generate` in a memory cgroup of exactly its cap, with the
file out of the page cache (mincore); cells are interleaved within a repeat, and ratios are taken
inside each repeat.  All cells of a model must say the same tokens, which is checked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from cards import write_card  # noqa: E402
from confined import run_confined  # noqa: E402
from frontier import machine  # noqa: E402

from flashllm import __version__  # noqa: E402
from flashllm.units import MIB, parse_size  # noqa: E402

STORIES = (
    "Once upon a time there was a little dog", "One day a girl named Lily went to the park",
    "Tom had a big red ball", "The sun was hot and the cat was", "Mum said that it was time to",
    "There was a small bird in a tree", "Ben and Mia liked to play with", "It was a cold day and",
)  # fmt: skip
# A story that is told twice and begun again, as when a text is corrected or quoted from.
TWICE = (
    "Lily had a red ball. She took it to the park. A big dog saw the ball and ran to it. Lily was "
    "sad. The dog gave the ball back and they were friends. "
) * 2 + "Lily had a red"
LONG = ",".join(map(str, np.random.default_rng(0).integers(3, 2000, 508)))


@dataclass(frozen=True)
class Cell:
    """Arguments of `flashllm generate`; `cap` None is the part's own.  A prompt that begins with a
    digit is token ids."""

    prompts: tuple[str, ...]
    extra: tuple[str, ...] = ()
    cap: str | None = None


PARTS = {
    "together": {
        "1 prompt": Cell(STORIES[:1]),
        "8 prompts": Cell(STORIES),
    },
    "drafts": {
        f"{text}, {drafts}": Cell((prompt,), ("--speculate", drafts))
        for text, prompt in (("told twice", TWICE), ("a story", STORIES[0]))
        for drafts in (("off", "auto", "4") if text == "told twice" else ("off", "auto"))
    },
    "prefill": {
        "resident": Cell((LONG,), cap="130%"),
        "at the cap": Cell((LONG,)),
    },
}


def run(model: Path, cell: Cell, cap: str, n_tokens: int) -> dict:
    n_bytes = parse_size(cell.cap or cap, whole_bytes=model.stat().st_size)
    command = [
        sys.executable, "-m", "flashllm", "generate", str(model), "--json", "--ignore-eos",
        "--temperature", "0", "--max-tokens", str(n_tokens), "--ram-budget", str(n_bytes),
        "--storage", "direct", *cell.extra,
    ]  # fmt: skip
    for prompt in cell.prompts:
        command += ["--token-ids" if prompt[0].isdigit() else "--prompt", prompt]
    done = run_confined(command, group_bytes=n_bytes, files=[model])
    if done.code:
        return {"failed": done.code, "stderr": done.err[-2000:], "charges": asdict(done.charges)}
    results = [json.loads(line) for line in done.out.splitlines()]
    first = results[0]
    timings, flash = first["timings"], first["flash"]
    alone = timings["predicted_per_second"]
    return {
        "cap_bytes": n_bytes,
        "tokens_per_s": timings.get("group_predicted_per_second", alone),
        "prompt_n": timings["prompt_n"],
        "prompt_per_second": timings["prompt_per_second"],
        "sequences": flash["sequences"],
        "sequences_limit": flash["sequences_limit"],
        "drafted": flash["drafted"],
        "accepted": flash["accepted"],
        "mib_per_token": flash["bytes_per_token"] / MIB,
        "time_over_floor": flash["time_over_floor"],
        "per_token_ms": timings["per_token_ms"],
        "prompt_time_over_floor": flash["prompt_time_over_floor"],
        "tokens": [result["tokens"] for result in results],
        "limit_hits": flash["limit_hits"],
        "charges": asdict(done.charges),
        "device_bytes": done.device_bytes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--cap", default="50%")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--only", default="", help="cells that begin so")
    parser.add_argument("--more", action="store_true", help="add repeats to the card")
    parser.add_argument("--out", type=Path, required=True, help="card without suffix")
    args = parser.parse_args()
    path = args.out.with_suffix(".json")
    card = json.loads(path.read_text()) if args.more else {
        "part": args.part, "flashllm": __version__, "cap": args.cap, "tokens": args.tokens,
        "machine": machine(args.models[0]), "runs": {},
    }  # fmt: skip
    card["command"] = f"bench/passes.py {args.part} {' '.join(m.name for m in args.models)}"
    for _ in range(args.repeats):
        for model in args.models:
            runs = card["runs"].setdefault(model.stem, [])
            runs.append({})
            cells = {n: c for n, c in PARTS[args.part].items() if n.startswith(args.only)}
            for name, cell in cells.items():
                runs[-1][name] = run(model, cell, args.cap, args.tokens)
                print(model.stem, name, runs[-1][name].get("tokens_per_s"), flush=True)
        write_card(args.out, card, table(card))
    print(args.out.with_suffix(".md").read_text())
    return 0


def agree(repeat: dict, part: str) -> bool:
    """Whether cells of one text said the same: sequence by sequence, draft by draft."""
    said: dict[str, list[int]] = {}
    for name, cell in PARTS[part].items():
        told = repeat.get(name, {}).get("tokens", ())
        for prompt, tokens in zip(cell.prompts, told, strict=False):
            if said.setdefault(prompt, tokens) != tokens:
                return False
    return True


def table(card: dict) -> str:
    part, speed = card["part"], "tokens_per_s"
    if part == "prefill":
        speed = "prompt_per_second"
    head = ("model | what | tok/s (each run) | x the first of its text | MiB/token | sequences | "
            "drafted, accepted | time / floor | peak MiB of cap | limit hits")  # fmt: skip
    lines = [
        f"# {TITLES[part]}", "", TEXTS[part].format(cap=card["cap"], tokens=card["tokens"]), "",
        f"`{card['command']}`", "",
        *(f"- {key}: {value}" for key, value in card["machine"].items()), "",
        f"| {head} |", "|" + " --- |" * len(head.split("|")),
    ]  # fmt: skip
    for model, repeats in card["runs"].items():
        for name, cell in PARTS[part].items():
            base = next(n for n, c in PARTS[part].items() if c.prompts[0] == cell.prompts[0])
            pairs = [(r[name], r[base]) for r in repeats if name in r and base in r]
            done = [(one, other) for one, other in pairs if speed in one and speed in other]
            if not done:
                lines += [f"| {model} | {name} | failed |"] if pairs else []
                continue
            rows = [row for row, _ in done]
            ratio = statistics.median(row[speed] / other[speed] for row, other in done)
            each = ", ".join(f"{row[speed]:.2f}" for row in rows)
            floor = "prompt_time_over_floor" if part == "prefill" else "time_over_floor"
            floors = [row[floor] for row in rows if row[floor] is not None]
            peak = max(row["charges"]["peak_bytes"] for row in rows) / MIB
            lines.append(
                f"| {model} | {name} | {statistics.median(row[speed] for row in rows):.2f} "
                f"({each}) | {ratio:.2f} | "
                f"{statistics.median(row['mib_per_token'] for row in rows):.1f} | "
                f"{rows[0]['sequences']} | {rows[0]['drafted']}, {rows[0]['accepted']} | "
                f"{statistics.median(floors) if floors else 0:.2f} | "
                f"{peak:.0f} of {rows[0]['cap_bytes'] / MIB:.0f} | "
                f"{sum(row['limit_hits'] or 0 for row in rows)} |"
            )
        same = all(agree(repeat, part) for repeat in repeats)
        lines.append(f"| {model} | every prompt's tokens the same in all cells | {same} |")
    return "\n".join([*lines, *(f"\n{note}" for note in card.get("notes", ()))]) + "\n"


MODEL = (
    "Models: the 656 k TinyStories Llama, SiLU and ReLU, inflated to 1 GiB (int8, raw; jittered "
    "copies, attention a third). Each cell a fresh process in a memory cgroup of exactly its cap "
    "({cap} of the file unless said), budget = cap, page cache cold, direct reads; ratios inside "
    "each repeat, then the median. The disk is shared and its rate moves between cells (see the "
    "runs): a ratio above the number of prompts, and a time below the floor, are its moods. "
)  # fmt: skip
TITLES = {
    "together": "A list of prompts in one pass over the weights",
    "drafts": "Drafts from the text itself",
    "prefill": "A prompt of several hundred tokens, streamed and resident",
}
TEXTS = {
    "together": MODEL + "{tokens} greedy tokens of every prompt; tok/s is of all of them together.",
    "drafts": MODEL + "{tokens} greedy tokens; `4` drafts four tokens whenever the text has "
    "something to go by, whatever it costs, `auto` up to eight and only while it pays.",
    "prefill": MODEL + "tok/s is of the prompt; the resident cell has a cap of 130 %.",
}


if __name__ == "__main__":
    sys.exit(main())
