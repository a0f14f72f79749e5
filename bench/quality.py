"""Perplexity and bytes per token: weight types against exact and approximate decoding.

    python bench/quality.py WORKDIR --name bundled --model demo.flash --fit-text A.txt
        --text B.txt --skip 1000000 --out bench/results/quality-bundled
    python bench/quality.py WORKDIR --name stories --model CHECKPOINT --text STORIES.txt --out …

For every weight type the model is converted with its deciding rows in the bundles, predictors are
fitted on one text and both modes measured on another, token by token as decoding does.  Bytes per
token are those of the weights that a token needs: attention, norms' matrices and head once, and of
every FFN what is computed (exact: the deciding matrix and the active bundles' other pieces;
approximate: the predicted bundles whole).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from cards import write_card

from flashllm import LLM, __version__
from flashllm.calibration.fitting import fit
from flashllm.container import open_container
from flashllm.conversion.convert import convert
from flashllm.engine.figures import flash_figures
from flashllm.engine.totals import Totals
from flashllm.evaluation import negative_log_likelihood
from flashllm.predictors.fit import fit_path

QUANTS = ("f32", "bf16", "int8", "int4")
RECALLS = (0.9, 0.95, 0.99)
WINDOW = 256
OWN = 24  # a model without a text of its kind writes so many windows itself, to be fitted to


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--name", required=True, help="of the model, for the table")
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint or container")
    parser.add_argument("--fit-text", type=Path, help="default: what the model writes itself")
    parser.add_argument("--fit-ids", type=Path, help="token ids instead; written where missing")
    parser.add_argument("--share", type=float, default=0.08, help="what predictors may keep")
    parser.add_argument("--text", type=Path, required=True, help="to measure on")
    parser.add_argument("--skip", type=int, default=0, help="characters of it to leave out")
    parser.add_argument("--limit", type=int, default=8000, help="characters to measure on")
    parser.add_argument("--tokens", type=int, default=16384, help="of the text that is fitted to")
    parser.add_argument("--quant", action="append", choices=QUANTS, help="default: all")
    parser.add_argument("--out", type=Path, required=True, help="card without suffix")
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    text = args.text.read_text(encoding="utf-8")[args.skip : args.skip + args.limit]
    rows = []
    for quant in args.quant or QUANTS:
        path = args.work / f"{args.name}-{quant}.flash"
        if not path.exists():
            convert(args.model, path, quant=quant, codec="raw", bundle="all")
        if not fit_path(path).exists():
            fitted_to(path, args)
        for recall in (None, *RECALLS):
            rows.append(measure(path, text, quant, recall))
            print(line(rows[-1], rows), flush=True)
        write(args, text, rows)  # what is there stays, whatever happens to the next
    return 0


def fitted_to(path: Path, args: argparse.Namespace) -> None:
    """Predictors beside `path`, from the text given or from the model's own."""
    if args.fit_text is not None:
        text = args.fit_text.read_text(encoding="utf-8")
        given = {"text": text, "text_name": args.fit_text.name}
    else:
        ids = args.fit_ids or args.work / f"{args.name}.ids"
        if not ids.exists():
            ids.write_text(",".join(map(str, written(path))))
        given = {"ids": [int(word) for word in ids.read_text().split(",")], "text_name": ids.name}
    fit(str(path), **given, n_tokens=args.tokens, window=WINDOW, recall=max(RECALLS),
        share=args.share)  # fmt: skip


def written(path: Path) -> list[int]:
    """Token ids that the model samples, windows of a full context."""
    ids: list[int] = []
    with LLM(str(path), n_context=2 * WINDOW) as llm:
        start = llm.encode("", add_bos=True)
        for seed in range(OWN):
            found = llm.generate(start, max_tokens=2 * WINDOW - len(start),
                                 temperature=1.0, seed=seed, ignore_eos=True)  # fmt: skip
            ids += [*start, *found.tokens]
    return ids


def measure(path: Path, text: str, quant: str, recall: float | None) -> dict:
    mode = {} if recall is None else {"mode": "approx", "recall": recall, "audit": 16}
    totals = Totals()
    with LLM(str(path), **mode) as llm:
        nats, n = negative_log_likelihood(llm, text, window=WINDOW, totals=totals, decoding=True)
    flash = flash_figures(totals)
    every = flash["all_bundles"]
    computed = flash["active_bundles"] / every
    predicted = flash["predicted_bundles"] / every if recall else None
    return {
        "quant": quant, "recall_asked": recall, "perplexity": math.exp(nats / n), "tokens": n,
        "bits_per_character": nats / math.log(2) / len(text), "computed": computed,
        "predicted": predicted, "recall": flash["recall"], "precision": flash["precision"],
        "bytes_per_token": bytes_per_token(path, computed, predicted),
    }  # fmt: skip


def bytes_per_token(path: Path, computed: float, predicted: float | None) -> float:
    """Bytes of the planes that a token needs; the embedding is a row unless it is the head too."""
    total = 0.0
    with open_container(path) as container:
        for name, plane in container.planes.items():
            size = plane.n_items * plane.stride
            if name.endswith(".ffn"):
                first = plane.n_items * plane.pieces[0].row_bytes
                rest = size - first
                total += predicted * size if predicted is not None else first + computed * rest
            elif name != "embed" or "head" not in container.planes:
                total += size
    return total


def write(args: argparse.Namespace, text: str, rows: list[dict]) -> None:
    fit_text = args.fit_text.name if args.fit_text else "what the model wrote itself"
    card = {"flashllm": __version__, "model": args.name, "fitted_to": fit_text,
            "measured_on": args.text.name, "skip": args.skip, "characters": len(text),
            "window": WINDOW, "share": args.share, "rows": rows}  # fmt: skip
    head = ("| weights | mode | perplexity | against exact | bits per character | computed | "
            "predicted | recall | precision | MB/token |")  # fmt: skip
    table = [f"# {args.name}: weight types, exact and approximate", "",
             f"{len(text)} characters of {args.text.name} from {args.skip} on, {rows[0]['tokens']} "
             f"tokens in windows of {WINDOW}, decoded one by one; predictors fitted to {fit_text}, "
             f"at most {100 * args.share:g} % of the streamed bytes. Computed and predicted: of "
             "all FFN neurons. Recall and precision: every 16th token audited. MB/token: bytes of "
             "the weights that a token needs (`python bench/quality.py -h`).", "",
             head, "|" + " --- |" * (head.count("|") - 1), *(line(row, rows) for row in rows)]
    write_card(args.out, card, "\n".join(table) + "\n")


def line(row: dict, rows: list[dict]) -> str:
    exact = next(r for r in rows if r["quant"] == row["quant"] and r["recall_asked"] is None)

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    mode = "exact" if row["recall_asked"] is None else f"approx {row['recall_asked']}"
    change = row["perplexity"] / exact["perplexity"] - 1
    return (f"| {row['quant']} | {mode} | {row['perplexity']:.3f} | {100 * change:+.2f} % | "
            f"{row['bits_per_character']:.4f} | {percent(row['computed'])} | "
            f"{percent(row['predicted'])} | {percent(row['recall'])} | "
            f"{percent(row['precision'])} | {row['bytes_per_token'] / 1e6:.2f} |")


if __name__ == "__main__":
    raise SystemExit(main())
