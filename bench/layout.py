"""What an order by co-activation saves on other text than the fitted one: simulated, on the disk.

    python bench/layout.py WORKDIR --out bench/results/layout   # WORKDIR: of approx.py --prepare

Three models: the bundled one; and both inflations of approx.py, copies that co-fire and copies that
do not, neurons in random order at first.  A trace of other text than the order's goes through a
cache of a quarter of each layer, and what it misses is costed on device curves and read from the
container with direct reads, layer by layer, 16 in flight, nothing computed.  Gaps are read through
where the probed curve says so.  Orders alternate inside each repeat; the traces of the inflated
models are made here when they are missing (192 tokens from character 1,000,000 on).
"""

from __future__ import annotations

import argparse
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
from flashllm.probe.device import probe_device  # noqa: E402
from flashllm.probe.named import CURVES  # noqa: E402
from flashllm.simulate import frames_used, replay  # noqa: E402
from flashllm.simulate.costs import cost  # noqa: E402
from flashllm.simulate.run import slots_for  # noqa: E402
from flashllm.storage import ReadBatch, open_storage  # noqa: E402
from flashllm.tracing import read_trace  # noqa: E402
from flashllm.units import MIB  # noqa: E402

TRACES = Path(__file__).parent.parent / "traces"
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


class Laid:
    """A container, what a trace misses of it, and reading that."""

    def __init__(self, path: Path, first: Path, trace: Path, *, cache: float, policy: str,
                 n_tokens: int):  # fmt: skip
        self.path, recorded = path, read_trace(trace)
        self.n_tokens = min(n_tokens, recorded.n_tokens)
        curve = probe_device(path, "direct")
        self.sim = dict.fromkeys(CURVES, 0.0)
        self.n_ops = self.n_bytes = self.useful = 0
        self.batches: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(self.n_tokens)]
        with open_container(path) as container, open_container(first) as before:
            for layer, info in enumerate(recorded.layers):
                plane = container.planes[info.plane]
                order = None if path == first else order_between(before, container, info.plane)
                uses = frames_used(*recorded.active(layer), n_bundles=info.n_bundles,
                                   per_frame=plane.per_frame, order=order)  # fmt: skip
                found = replay(uses, POLICIES[policy](slots_for(cache, uses.n_frames)))
                self._add(FrameSource(plane, container.alignment), found, curve)

    def _add(self, source: FrameSource, found, curve) -> None:
        misses = found.where(found.token < self.n_tokens)
        for name, device in CURVES.items():
            spent = cost(misses, device, frame_bytes=source.slot_bytes, gap_limit=MAX_GAP)
            self.sim[name] += 1e3 * spent.seconds / self.n_tokens
        gap = worthwhile_gap(curve, bytes_each=source.slot_bytes, limit=MAX_GAP)
        self.useful += int(misses.n_active.sum()) * source.plane.stride
        for token in range(self.n_tokens):
            frames = misses.frame[misses.token == token]
            if len(frames):
                extents = source.extents(frames, max_gap=gap, max_extent=MAX_EXTENT)
                self.batches[token].append((extents.offset, extents.length))
                self.n_ops += len(extents)
                self.n_bytes += extents.n_bytes

    def read(self) -> float:
        """Milliseconds a token."""
        room = np.frombuffer(mmap.mmap(-1, MAX_EXTENT + MIB), np.uint8)
        with open_storage("direct", self.path, depth=16) as storage:
            started = time.perf_counter()
            for batches in self.batches:
                for offset, length in batches:
                    into = np.full(len(offset), room.ctypes.data)
                    with storage.submit(ReadBatch.plain(offset, length, into)) as ticket:
                        ticket.wait(len(offset))
            return 1e3 * (time.perf_counter() - started) / self.n_tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", type=Path, help="for traces that are missing")
    parser.add_argument("--cache", type=float, default=0.25, help="share of each layer")
    parser.add_argument("--policy", default="lfu")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="card without suffix")
    args = parser.parse_args()
    laid = {
        (name, order): Laid(path, first, trace, cache=args.cache, policy=args.policy,
                            n_tokens=args.tokens)
        for name, (first, after, trace) in models(args.work, args.text).items()
        for order, path in (("before", first), ("fitted", after))
    }  # fmt: skip
    ms: dict[tuple[str, str], list[float]] = {key: [] for key in laid}
    for _ in range(args.repeats):
        for key, one in laid.items():
            ms[key].append(one.read())
    rows = [
        {
            "model": name, "order": order, "tokens": one.n_tokens, "disk_ms": ms[name, order],
            "reads_per_token": one.n_ops / one.n_tokens,
            "bytes_per_token": one.n_bytes / one.n_tokens,
            "wasted_bytes_per_token": (one.n_bytes - one.useful) / one.n_tokens,
            "simulated_ms": one.sim,
        }
        for (name, order), one in laid.items()
    ]  # fmt: skip
    text = card(rows, args)
    print(text)
    if args.out is not None:
        about = {"flashllm": __version__, "cache": args.cache, "policy": args.policy}
        write_card(args.out, about | {"rows": rows}, text)
    return 0


def card(rows: list[dict], args: argparse.Namespace) -> str:
    names = list(CURVES)
    lines = [
        "# Orders by co-activation, on text that they were not fitted to", "",
        f"Bundles that hold everything (the inflated models) or a neuron's other pieces (the "
        f"bundled one, in frames of its container); {100 * args.cache:.0f} % of each layer cached "
        f"under {args.policy}; FFN reads only, per token. Disk: direct reads, median of "
        f"{args.repeats} alternating repeats, each in brackets. Simulated: flash time on the named "
        "curves. Only text that the order was not fitted to. `bench/layout.py` makes this table.",
        "", *(f"- *{name}*: {about}" for name, about in ABOUT.items()), "",
        "| model | order | reads | MiB | wasted MiB | disk ms | "
        + " | ".join(f"{name} ms" for name in names) + " |",
        "|" + " --- |" * (6 + len(names)),
    ]  # fmt: skip
    for row in rows:
        each = ", ".join(f"{value:.1f}" for value in row["disk_ms"])
        simulated = " | ".join(f"{row['simulated_ms'][name]:.1f}" for name in names)
        lines.append(
            f"| {row['model']} | {row['order']} | {row['reads_per_token']:.0f} | "
            f"{row['bytes_per_token'] / MIB:.2f} | {row['wasted_bytes_per_token'] / MIB:.2f} | "
            f"{statistics.median(row['disk_ms']):.1f} ({each}) | {simulated} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
