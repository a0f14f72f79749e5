"""`flashllm fit` inside a memory group of a share of the file, and what it found on other text.

    python bench/fit_capped.py NAME=MODEL … --text A.txt --other B.txt --cap 50% --out CARD
    python bench/fit_capped.py NAME=MODEL --ids A.ids --other-ids B.ids …   (no text of its kind)

Every fit is a process of its own, its file out of the page cache first.  Recall and precision on
the other text are counted token by token against the exact engine; nothing was fitted to it.  A
card that exists gains rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from cards import write_card
from confined import run_confined

from flashllm import LLM, __version__
from flashllm.calibration.recording import windows
from flashllm.predictors import open_fit
from flashllm.predictors.fit import fit_path
from flashllm.units import MIB, parse_size

RECALL = 0.99
OTHER_TOKENS = 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="NAME=MODEL")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--other-ids", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--cap", default="50%")
    parser.add_argument("--out", type=Path, required=True, help="card without suffix")
    args = parser.parse_args()
    rows = []
    if args.out.with_suffix(".json").exists():
        rows = json.loads(args.out.with_suffix(".json").read_text())["rows"]
    for given in args.models:
        name, _, model = given.partition("=")
        rows.append(one(name, Path(model), args))
        write(args, rows)
    print(args.out.with_suffix(".md").read_text())
    return 0


def one(name: str, model: Path, args: argparse.Namespace) -> dict:
    size = model.stat().st_size
    cap = parse_size(args.cap, whole_bytes=size)
    fit_path(model).unlink(missing_ok=True)
    source = ["--text", args.text] if args.text else ["--token-ids-file", args.ids]
    command = [sys.executable, "-m", "flashllm", "fit", model, *source, "--recall", RECALL,
               "--tokens", args.tokens, "--window", args.window, "--ram-budget", cap, "--json"]
    done = run_confined([str(word) for word in command], group_bytes=cap, files=[model])
    row = {"name": name, "file_bytes": size, "cap_bytes": cap, "seconds": done.seconds,
           "peak_bytes": done.charges.peak_bytes, "limit_hits": done.charges.failcnt,
           "oom_kills": done.charges.oom_kills, "text": (args.text or args.ids).name}  # fmt: skip
    if done.code:
        return {**row, "failed": f"exit code {done.code}, {done.charges.oom_kills} kills: "
                + done.err.strip().splitlines()[-1]}  # fmt: skip
    said = json.loads(done.out)
    for layer in said["layers"]:
        del layer["recalls"], layer["precisions"]
    found = held_out(model, args)
    return {**row, **{key: said[key] for key in (
        "recall", "precision", "share", "microseconds", "tokens", "layers")},
        "other": (args.other or args.other_ids).name, "on_other": found}  # fmt: skip


def held_out(model: Path, args: argparse.Namespace) -> dict:
    """Recall and precision of every layer on the other text."""
    with LLM(str(model), n_context=args.window) as llm:
        if args.other:
            parts = windows(llm, args.other.read_text(encoding="utf-8"), window=None)
        else:
            ids = [int(word) for word in args.other_ids.read_text().replace(",", " ").split()]
            parts = (ids[i : i + args.window] for i in range(0, len(ids), args.window))
        predictors = open_fit(fit_path(model)).load(llm.kernels, RECALL)
        sums = {layer: np.zeros(3, np.int64) for layer in predictors}

        def observer(layer: int, x: np.ndarray, decided: np.ndarray) -> None:
            for token, truth in zip(x, decided > 0, strict=True):
                ids = predictors[layer].predict(token)
                sums[layer] += truth.sum(), ids.size, truth[ids].sum()

        n = 0
        for part in parts:
            part = part[: OTHER_TOKENS - n]
            llm.observe(part, observer)
            n += len(part)
            if n >= OTHER_TOKENS:
                break
    recall = [float(hit / true) for true, _, hit in sums.values()]
    precision = [float(hit / guessed) for _, guessed, hit in sums.values()]
    return {"tokens": n, "recall": float(np.mean(recall)), "precision": float(np.mean(precision)),
            "recalls": recall, "precisions": precision}  # fmt: skip


def write(args: argparse.Namespace, rows: list[dict]) -> None:
    card = {"flashllm": __version__, "asked_recall": RECALL, "cap": args.cap, "rows": rows}
    head = ("| model | file | cap | peak | seconds | predictors | recall | precision | "
            "on other text: recall | precision |")  # fmt: skip
    lines = [
        "# Fitting under a cap", "",
        f"`flashllm fit` asked for recall {RECALL}, in a memory group of the cap (the kernel kills "
        "what passes it), page cache cold. Recall and precision are means over layers: first on "
        "the end of the text, which nothing was fitted to, then on another file. Predictors: "
        "share of the streamed bytes. Raw numbers, layer by layer, in the JSON beside this.", "",
        head, "|" + " --- |" * (head.count("|") - 1),
    ]  # fmt: skip
    for row in rows:
        start = (f"| {row['name']} | {row['file_bytes'] / MIB:.0f} MiB | "
                 f"{row['cap_bytes'] / MIB:.0f} MiB | ")  # fmt: skip
        if "failed" in row:
            lines.append(f"{start}failed: {row['failed']} | | | | | | |")
            continue
        other = row["on_other"]
        lines.append(
            f"{start}{row['peak_bytes'] / MIB:.0f} MiB | {row['seconds']:.0f} | "
            f"{100 * row['share']:.1f} % | {row['recall']:.4f} | {row['precision']:.3f} | "
            f"{other['recall']:.4f} ({row['other']}) | {other['precision']:.3f} |"
        )
    write_card(args.out, card, "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
