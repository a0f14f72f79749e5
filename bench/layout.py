"""What orders by co-activation and clusters of neurons save: simulated, and read from the disk.

    python bench/layout.py WORKDIR --text A.txt --prepare         # WORKDIR: of approx.py --prepare
    python bench/layout.py WORKDIR --out bench/results/layout     # reads: nothing else should run

Three models: the bundled one; and both inflations of approx.py, copies that co-fire and copies that
do not, neurons in random order at first.  A trace of other text than the order's goes through a
cache of a quarter of each layer; what it misses is costed on device curves and read from the
container with direct reads, layer by layer, 16 in flight, nothing computed.  Single neurons stand
against clusters: of `frame` neighbours read together, of `unit` predicted together.  Gaps are read
through where the default curve says so, so that every run asks for the same reads.  All cells
alternate inside each repeat; traces of the inflated models are made when they are missing (192
tokens from character 1,000,000 on).
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from approx import file_of, verb  # noqa: E402
from cards import write_card  # noqa: E402
from carry_fit import order_between  # noqa: E402

from flashllm import __version__  # noqa: E402
from flashllm.bundled import bundled_model  # noqa: E402
from flashllm.cache import POLICIES  # noqa: E402
from flashllm.container import open_container  # noqa: E402
from flashllm.conversion.relayout import relayout  # noqa: E402
from flashllm.offload.frames import FrameSource  # noqa: E402
from flashllm.offload.pick import MAX_EXTENT  # noqa: E402
from flashllm.offload.planner import worthwhile_gap  # noqa: E402
from flashllm.offload.state import MAX_GAP  # noqa: E402
from flashllm.probe.named import CURVES  # noqa: E402
from flashllm.simulate import Misses, frames_used, replay  # noqa: E402
from flashllm.simulate.costs import cost  # noqa: E402
from flashllm.simulate.run import slots_for  # noqa: E402
from flashllm.storage import ReadBatch, open_storage  # noqa: E402
from flashllm.tracing import read_trace  # noqa: E402
from flashllm.units import MIB  # noqa: E402

TRACES = Path(__file__).parent.parent / "traces"
# (neighbours predicted together, frames read together)
CLUSTERS = ((1, 1), (4, 1), (4, 4), (16, 1), (16, 16))
ABOUT = {
    "bundled": "the bundled model, 6 x 1536 neurons",
    "together": "inflated to 1.05 GiB, copies fire together, 12 x 15360 neurons",
    "apart": "the same, copies do not fire together",
}


def models(work: Path, text: Path | None) -> dict[str, tuple[Path, Path, Path]]:
    """name -> (container in its first order, the same in the fitted one, trace of other text)."""
    laid = work / "bundled-fitted.flash"
    if not laid.exists():
        relayout(bundled_model(), laid, trace=TRACES / "demo-books-fit.fltrace")
    found = {"bundled": (Path(bundled_model()), laid, TRACES / "demo-books-test.fltrace")}
    for name, apart in (("together", False), ("apart", True)):
        first, after = (file_of(work, apart, which) for which in ("all-random", "all-fitted"))
        trace = file_of(work, apart, "test").with_suffix(".fltrace")
        if first.exists() and after.exists():
            source = file_of(work, apart, "split-random")
            verb(["trace", source, "--text", text, "--skip", 1_000_000, "--tokens", 192,
                  "--window", 192], trace)  # fmt: skip
            found[name] = (first, after, trace)
    return found


def misses_of(uses, *, cache: float, policy: str, n_tokens: int) -> Misses:
    found = replay(uses, POLICIES[policy](slots_for(cache, uses.n_frames)))
    return found.where(found.token < n_tokens)


def planned(name: str, order: str, path: Path, first: Path, trace: Path, args) -> list[dict]:
    """A cell for every kind of cluster: what it is, and the reads of every token and layer as
    (offset, length) arrays under `batches`."""
    recorded = read_trace(trace)
    n_tokens = min(args.tokens, recorded.n_tokens)
    cells = [
        {"model": name, "order": order, "unit": unit, "frame": frame, "tokens": n_tokens,
         "path": path.name, "reads": 0, "bytes": 0, "useful": 0,
         "simulated_ms": dict.fromkeys(CURVES, 0.0), "batches": [[] for _ in range(n_tokens)]}
        for unit, frame in CLUSTERS
    ]  # fmt: skip
    with open_container(path) as container, open_container(first) as before:
        for layer, info in enumerate(recorded.layers):
            plane = container.planes[info.plane]
            source = FrameSource(plane, container.alignment)
            places = None if path == first else order_between(before, container, info.plane)
            for cell in cells:
                uses = frames_used(
                    *recorded.active(layer), n_bundles=info.n_bundles, unit=cell["unit"],
                    per_frame=plane.per_frame * cell["frame"], order=places,
                )  # fmt: skip
                missed = misses_of(uses, cache=args.cache, policy=args.policy, n_tokens=n_tokens)
                _add(cell, source, missed)
    return cells


def _add(cell: dict, source: FrameSource, missed: Misses) -> None:
    """A layer's reads: a cluster is so many neighbouring frames of the container."""
    n, size = cell["frame"], source.slot_bytes
    for name, device in CURVES.items():
        spent = cost(missed, device, frame_bytes=n * size, gap_limit=MAX_GAP)
        cell["simulated_ms"][name] += 1e3 * spent.seconds / cell["tokens"]
    gap = worthwhile_gap(CURVES["default"], bytes_each=n * size, limit=MAX_GAP)
    cell["useful"] += int(missed.n_active.sum()) * source.plane.stride
    for token in range(cell["tokens"]):
        clusters = missed.frame[missed.token == token]
        if len(clusters):
            frames = (clusters[:, None] * n + np.arange(n)).ravel()
            frames = frames[frames < source.n_frames].astype(np.int32)
            extents = source.extents(frames, max_gap=gap, max_extent=MAX_EXTENT)
            cell["batches"][token].append((extents.offset, extents.length))
            cell["reads"] += len(extents)
            cell["bytes"] += extents.n_bytes


def save(cells: list[dict], path: Path) -> None:
    """Cells as JSON, their reads as one array beside it: rows of offset, length and batch."""
    arrays = {}
    for i, cell in enumerate(cells):
        batches = [batch for many in cell.pop("batches") for batch in many]
        at = np.repeat(np.arange(len(batches)), [len(offset) for offset, _ in batches])
        arrays[f"reads{i}"] = np.stack([np.concatenate([b[0] for b in batches]),
                                        np.concatenate([b[1] for b in batches]), at])  # fmt: skip
    np.savez(path.with_suffix(".npz"), **arrays)
    path.with_suffix(".json").write_text(json.dumps(cells))


def load(path: Path) -> list[dict]:
    cells = json.loads(path.with_suffix(".json").read_text())
    with np.load(path.with_suffix(".npz")) as arrays:
        for i, cell in enumerate(cells):
            offset, length, at = arrays[f"reads{i}"]
            ends = np.flatnonzero(np.diff(at)) + 1
            cell["batches"] = list(zip(np.split(offset, ends), np.split(length, ends), strict=True))
    return cells


def read(path: Path, cell: dict) -> float:
    """Milliseconds a token."""
    room = np.frombuffer(mmap.mmap(-1, MAX_EXTENT + MIB), np.uint8)
    with open_storage("direct", path, depth=16) as storage:
        started = time.perf_counter()
        for offset, length in cell["batches"]:
            into = np.full(len(offset), room.ctypes.data)
            with storage.submit(ReadBatch.plain(offset, length, into)) as ticket:
                ticket.wait(len(offset))
        return 1e3 * (time.perf_counter() - started) / cell["tokens"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", type=Path, help="for traces that are missing")
    parser.add_argument("--prepare", action="store_true", help="work out what to read, and end")
    parser.add_argument("--cache", type=float, default=0.25, help="share of each layer")
    parser.add_argument("--policy", default="lfu")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="card without suffix")
    args = parser.parse_args()
    plan, paths = args.work / "layout-reads", {}
    made = models(args.work, args.text)
    for name, (first, after, _) in made.items():
        paths[name, "before"], paths[name, "fitted"] = first, after
    if args.prepare:
        cells = []
        for (name, order), path in paths.items():
            cells += planned(name, order, path, made[name][0], made[name][2], args)
            print(name, order, flush=True)
        save(cells, plan)
        return 0
    cells = load(plan)
    for cell in cells:
        cell["disk_ms"] = []
    for repeat in range(args.repeats):
        for cell in cells:
            cell["disk_ms"].append(read(paths[cell["model"], cell["order"]], cell))
        print(repeat, flush=True)
        if args.out is not None:
            rows = [{k: v for k, v in cell.items() if k != "batches"} for cell in cells]
            about = {"flashllm": __version__, "cache": args.cache, "policy": args.policy}
            write_card(args.out, about | {"rows": rows}, card(rows, args))
    return 0


def card(rows: list[dict], args: argparse.Namespace) -> str:
    names = list(CURVES)
    lines = [
        "# Orders by co-activation and clusters of neurons, on text that they were not fitted to",
        "",
        f"Bundles that hold everything (the inflated models) or a neuron's other pieces (the "
        f"bundled one, in frames of its container); {100 * args.cache:.0f} % of each layer cached "
        f"under {args.policy}; FFN reads only, per token. *unit*: neighbours predicted together, "
        "without error; *frame*: frames of the container read together. Disk: direct reads of "
        f"{rows[0]['tokens']} tokens, 16 in flight, nothing computed; median of {args.repeats} "
        "alternating repeats, each in brackets. Simulated: flash time on the named curves. "
        "`bench/layout.py` makes this table.",
        "", *(f"- *{name}*: {about}" for name, about in ABOUT.items()), "",
        "| model | order | unit | frame | reads | MiB | wasted MiB | disk ms | "
        + " | ".join(f"{name} ms" for name in names) + " |",
        "|" + " --- |" * (8 + len(names)),
    ]  # fmt: skip
    for row in rows:
        n = row["tokens"]
        each = ", ".join(f"{value:.1f}" for value in row["disk_ms"])
        simulated = " | ".join(f"{row['simulated_ms'][name]:.1f}" for name in names)
        lines.append(
            f"| {row['model']} | {row['order']} | {row['unit']} | {row['frame']} | "
            f"{row['reads'] / n:.0f} | {row['bytes'] / n / MIB:.2f} | "
            f"{(row['bytes'] - row['useful']) / n / MIB:.2f} | "
            f"{statistics.median(row['disk_ms']):.1f} ({each}) | {simulated} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
