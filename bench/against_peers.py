"""Ours against what people would otherwise use: the same shape, bits, threads, prompt and tokens,
in memory groups of the same size, cold, interleaved in one run.

    python bench/against_peers.py prepare MODEL.flash --work DIR [where peers are]
    python bench/against_peers.py round   MODEL.flash --work DIR [where peers are]   # three times
    python bench/against_peers.py card    bench/results/NAME --work DIR MODEL.flash …

`prepare` makes the peers' files from the container's weights.  A `round` runs every cell once and
adds it to DIR/MODEL.runs.json; rounds are separate so that a shared machine is held for minutes
only, and one round may come in parts: `--go-on` adds its cells to the last one.  `card` writes
markdown and JSON; its ratios are taken inside each round, then the median.

A cell is a cap and a peer: `--cells 50%:ours,llama.cpp`; `all`: a group in which nothing is short.
Caps are shares of our container, which is as large as the GGUF file within half a per cent.  Peers
that crawl decode fewer tokens (the card says how many).  Exact mode reads less where deciding rows
lie apart, approximate mode where they do not: `--exact MODEL.flash` is the same model for the cells
of exact mode (`ours`, `naive`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import peers
from confined import read_ahead_file
from frontier import machine
from peers.base import Job
from peers.card import write_card

from flashllm import __version__
from flashllm.assembly import load_tokenizer
from flashllm.container import open_container
from flashllm.errors import UnsupportedError
from flashllm.models.configs import config_from_dict
from flashllm.units import parse_size

CELLS = [
    "all:ours,llama.cpp",
    "50%:ours,llama.cpp,llama.cpp-128k,naive,llama.cpp-no-mmap",
    "25%:ours,llama.cpp,llama.cpp-128k",
]
SLOW = ("accelerate", "airllm")
EXACT = ("ours", "naive")


def cells(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(cap, peer) in the order of a round: peers of one cap follow one another."""
    found = []
    for text in args.cells:
        cap, _, names = text.partition(":")
        found += [(cap, name) for name in names.split(",")]
    return found


def prompt_ids(model: Path, n: int, text: Path | None) -> list[int]:
    """The first `n` ids of `text` by the model's tokenizer, or random ones."""
    with open_container(model) as container:
        if text is not None:
            config = config_from_dict(container.family, container.config, path=model)
            tokenizer = load_tokenizer(container, config)
            return [int(i) for i in tokenizer.encode(text.read_text()[: 40 * n])[:n]]
        n_vocab = container.config["vocab_size"]
    return np.random.default_rng(0).integers(3, n_vocab, n).tolist()


def n_tokens(cap: str, name: str, args: argparse.Namespace) -> int:
    if name in SLOW:
        return args.slow_tokens
    return args.tokens if cap == "all" or name.startswith("ours") else args.crawl_tokens


def prepare(args: argparse.Namespace) -> dict[str, dict]:
    """Peer key -> {"file", "difference"} or {"missing": why}."""
    found = {}
    for name in dict.fromkeys(name for _, name in cells(args)):
        peer = peers.make(name, args)
        why = peers.trouble(peer, args.work)
        if why is None:
            try:
                model = args.exact if args.exact and name in EXACT else args.model
                file = peer.prepare(model, args.work)
                found[name] = {"file": str(file), "difference": peer.difference(file)}
                continue
            except (UnsupportedError, RuntimeError) as error:
                why = str(error)
        found[name] = {"missing": tidy(why, args.work)}
    return found


def one_round(args: argparse.Namespace) -> None:
    runs_file = args.work / f"{args.model.stem}.runs.json"
    size, ready = args.model.stat().st_size, prepare(args)
    ids = prompt_ids(args.model, args.prompt, args.text)
    seen = json.loads(runs_file.read_text()) if runs_file.exists() else {"rounds": []}
    seen |= {
        "model": args.model.name, "bytes": size, "note": args.note, "threads": args.threads,
        "n_prompt": len(ids), "flashllm": __version__, "machine": machine(args.model),
        "read_ahead_kib": int(read_ahead_file(args.work).read_text()),
    }  # fmt: skip
    if not args.go_on or not seen["rounds"]:
        seen["rounds"].append([])
    results = seen["rounds"][-1]
    for cap, name in cells(args):
        peer = peers.make(name, args)
        row = {"cap": cap, "key": name, "peer": peer.name, **ready[name]}
        row.pop("file", None)
        if "missing" not in row:
            n_bytes = size if cap == "all" else parse_size(cap, whole_bytes=size)
            job = Job(ids, n_tokens(cap, name, args), args.threads, n_bytes, cap != "all",
                      args.timeout)  # fmt: skip
            row |= {"cap_bytes": n_bytes, "n_tokens": job.tokens}
            row |= peers.measure(peer, Path(ready[name]["file"]), job)
            row["why"] = tidy(row.get("why", ""), args.work)
        results.append(row)
        runs_file.write_text(json.dumps(seen))  # what ran stays if a later cell is ended
        print(f"{args.model.name} {cap:>4} {peer.name:<32} {short(row)}", flush=True)


def short(row: dict) -> str:
    if "missing" in row:
        return f"missing: {row['missing']}"
    if row["state"] != "ran":
        return f"{row['state']}: {row['why']}"
    return f"{row['tokens_per_s']:.2f} tok/s, prefill {row['prefill_tokens_per_s']:.1f}"


def tidy(text: str, work: Path) -> str:
    """Cards travel: no path of this machine in them."""
    for path in (work.resolve(), Path(sys.prefix), Path.cwd(), Path.home()):
        text = text.replace(f"{path}/", "")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("prepare", "round"):
        sub = verbs.add_parser(verb)
        sub.add_argument("model", type=Path)
        sub.add_argument("--work", type=Path, required=True, help="peers' files and runs")
        sub.add_argument("--cells", nargs="+", default=CELLS)
        sub.add_argument("--threads", type=int, default=2)
        sub.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
        sub.add_argument("--text", type=Path, help="what the prompt is cut from; else random ids")
        sub.add_argument("--tokens", type=int, default=32)
        sub.add_argument("--crawl-tokens", type=int, default=8, help="of peers under a cap")
        sub.add_argument("--slow-tokens", type=int, default=3, help=f"of {' and '.join(SLOW)}")
        sub.add_argument("--timeout", type=float, default=180)
        sub.add_argument("--note", default="", help="what the model is, for the card")
        sub.add_argument("--exact", type=Path, help=f"the container of {' and '.join(EXACT)}")
        sub.add_argument("--go-on", action="store_true", help="cells join the last round")
        peers.add_arguments(sub)
    card = verbs.add_parser("card")
    card.add_argument("out", type=Path, help="without suffix")
    card.add_argument("models", nargs="+", type=Path)
    card.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    if args.verb == "card":
        runs = [args.work / f"{model.stem}.runs.json" for model in args.models]
        print(write_card(args.out, [json.loads(file.read_text()) for file in runs]))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    args.work = args.work.resolve()
    if args.verb == "prepare":
        print(json.dumps(prepare(args), indent=1))
    else:
        one_round(args)


if __name__ == "__main__":
    main()
