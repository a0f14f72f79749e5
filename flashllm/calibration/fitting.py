"""Fitting predictors to a container, inside a RAM budget: `fit`.

An exact engine reads the text and statistics are gathered for as many layers at a time as the
budget has room for, which are a line of its plan; then the engine is closed, those layers are
solved, and the next pass begins.  The .fit file appears under its name when all of them are in it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..api import LLM
from ..assembly import budget_bytes, read_config
from ..container import Container, open_container
from ..conversion.from_container import PlaneReader
from ..errors import BudgetError, UsageError
from ..kernels import choose_kernels
from ..planning import GROWTH_BYTES
from ..predictors.fit import fit_path
from ..predictors.header import MAX_NAME, Header
from ..predictors.scores import Scratch
from ..quant import WEIGHT_TYPES
from . import statistics
from .fit_writer import FitWriter
from .low_bit import BITS, GRID
from .recording import sparse_layers, windows
from .solving import KINDS, SHARES, Aims, LayerTask, Solved, choose, solve
from .statistics import LayerStatistics, roles_of

RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
SHARE = 0.08  # of the bytes that stream: more would be better spent on caching them
WINDOW = 512
LEAST_TOKENS = 64

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class FitReport:
    """What came out: one Solved per layer, and sums."""

    path: Path
    recall: float
    recalls: tuple[float, ...]
    layers: tuple[Solved, ...]
    resident_bytes: int
    streamed_bytes: int
    n_tokens: int
    n_passes: int
    seconds: float

    @property
    def share(self) -> float:
        return self.resident_bytes / self.streamed_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        at = self.recalls.index(self.recall)
        rows = [
            {
                "layer": one.layer.layer, "kind": one.layer.kind, "form": one.layer.form,
                "unit": one.layer.unit, "n_bundles": one.layer.n_bundles,
                "resident_bytes": one.resident_bytes, "microseconds": one.microseconds,
                "recall": one.layer.recall[at], "precision": one.layer.precision[at],
                "recalls": one.layer.recall, "precisions": one.layer.precision,
                "candidates": one.candidates,
            }
            for one in self.layers
        ]  # fmt: skip
        n = len(rows)
        return {
            "path": str(self.path), "asked": self.recall, "recalls": self.recalls, "layers": rows,
            "recall": sum(row["recall"] for row in rows) / n,
            "precision": sum(row["precision"] for row in rows) / n,
            "resident_bytes": self.resident_bytes, "streamed_bytes": self.streamed_bytes,
            "share": self.share, "microseconds": sum(row["microseconds"] for row in rows),
            "tokens": self.n_tokens, "passes": self.n_passes, "seconds": self.seconds,
        }  # fmt: skip


def fit(
    model: str,
    *,
    text: str | None = None,
    ids: Sequence[int] | None = None,
    text_name: str,
    out: str | Path | None = None,
    recall: float = 0.99,
    share: float = SHARE,
    n_tokens: int = 16384,
    window: int = WINDOW,
    kinds: tuple[str, ...] = KINDS,
    unit: int = 1,
    ram_budget: int | str | None = None,
    progress: Progress | None = None,
    **engine: Any,
) -> FitReport:
    """Fit predictors of every sparse layer of `model` to `text` (or token `ids`) and write them to
    `out`, by default beside the model where they are found.

    `recall` decides how they are made; thresholds are set for it and for RECALLS.  `share`: of the
    streamed bytes, what all predictors together may keep in memory.
    """
    started = time.perf_counter()
    if (text is None) == (ids is None):
        raise UsageError("fitting takes a text or token ids")
    if not 0 < recall < 1 or not 0 < share <= 1:
        raise UsageError(f"recall {recall} and share {share} must lie between 0 and 1")
    recalls = tuple(sorted({*RECALLS, float(recall)}))
    out = fit_path(model) if out is None else Path(out)
    with open_container(model) as container:
        window = min(window, read_config(container)[0].n_context)
    engine = {**engine, "n_context": window, "mode": "exact"}
    with LLM(model, ram_budget=ram_budget, **engine) as llm:
        said = _windows(llm, text, ids, n_tokens)
        layers, _ = sparse_layers(llm)
        digest, lines = llm.container.digest, llm.plan.ledger
        floor, process = lines.floor_bytes, lines["process as it stands"]
        budget = budget_bytes(ram_budget, llm.container.size)
    roles = roles_of(said)
    tokens = {role: sum(len(w) for w, r in zip(said, roles, strict=True) if r == role)
              for role in statistics.ROLES}  # fmt: skip
    with open_container(model) as container, FitWriter(out) as writer, closing(
        choose_kernels(engine.get("kernels"), n_threads=engine.get("num_threads") or 1)
    ) as kernels:
        config, _ = read_config(container)
        tasks = [_task(container, config.hidden_size, layer) for layer in layers]
        common = _common_bytes(tasks)
        options: list[list[Solved]] = []
        numbers: dict[int, int] = {}  # of an option's section
        groups = _groups(tasks, tokens, budget=budget, floor=floor, process=process)
        for number, group in enumerate(groups):
            gathered = _gather(
                model, group, said, roles, tokens, ram_budget=ram_budget, engine=engine,
                progress=progress, label=f"pass {number + 1} of {len(groups)}",
            )  # fmt: skip
            for task in group:
                fair = int(share * task.streamed_bytes) - common // len(tasks)
                aims = Aims(
                    recall=float(recall), recalls=recalls, kinds=kinds, unit=unit,
                    budgets=tuple(int(part * fair) for part in SHARES),
                )  # fmt: skip
                options.append(solve(task, gathered.pop(task.layer), aims, kernels))
                for i, one in enumerate(options[-1]):
                    numbers[id(one.layer)] = writer.add(one.layer, one.section)
                    options[-1][i] = replace(one, section=b"")
                if progress is not None:
                    progress(len(options), len(tasks), "layers")
        streamed = sum(task.streamed_bytes for task in tasks)
        solved = choose(options, int(share * streamed) - common)
        words = text.encode() if text is not None else repr(list(ids)).encode()
        header = writer.commit(Header(
            model=digest, hidden_size=config.hidden_size, text=hashlib.sha256(words).hexdigest(),
            text_name=_ascii(text_name), n_tokens=sum(tokens.values()), recalls=recalls,
            layers=tuple(one.layer for one in solved),
        ), [numbers[id(one.layer)] for one in solved])  # fmt: skip
    return FitReport(
        path=out, recall=float(recall), recalls=recalls,
        layers=tuple(replace(s, layer=at) for s, at in zip(solved, header.layers, strict=True)),
        resident_bytes=sum(one.resident_bytes for one in solved) + common,
        streamed_bytes=streamed,
        n_tokens=sum(tokens.values()), n_passes=len(groups),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _windows(llm: LLM, text: str | None, ids: Sequence[int] | None, most: int) -> list[np.ndarray]:
    """Contexts of token ids, `most` tokens in all."""
    if text is not None:
        found = windows(llm, text, window=None)
    else:
        size = llm.n_context
        found = (np.array(ids[at : at + size], np.int32) for at in range(0, len(ids), size))
    taken, n = [], 0
    for one in found:
        taken.append(one[: most - n])
        n += len(taken[-1])
        if n == most:
            break
    if n < LEAST_TOKENS or len(taken) < 3:
        raise UsageError(
            f"{n} tokens in {len(taken)} contexts are too few to fit to: {LEAST_TOKENS} in 3 at "
            "least, thousands to be of use"
        )
    return taken


def _task(container: Container, hidden_size: int, layer: int) -> LayerTask:
    """What a layer's fitting reads from the container, however it arranges a neuron's pieces."""
    planes, prefix = container.planes, f"layers.{layer}."
    ffn, apart = planes[prefix + "ffn"], planes.get(prefix + "deciding")
    plane = ffn if apart is None else apart
    names = [piece.name for piece in plane.pieces]
    name = next(name for name in ("row", "gate", "up") if name in names)
    piece, reader = plane.piece(name), PlaneReader(plane, container)
    # Where the deciding row lies in the bundle its bias has the name of the piece.
    bias_name = prefix + ("deciding.bias" if apart is not None else f"{name}.bias")
    bias = container.load_vectors()[bias_name] if bias_name in container.vectors else None

    def rows(first: int, stop: int) -> np.ndarray:
        raw = reader.items(piece, first, stop)
        return WEIGHT_TYPES[piece.weight_type].decode(raw, piece.n_cols)

    return LayerTask(
        layer=layer, n_bundles=ffn.n_items, hidden_size=hidden_size, rows=rows, bias=bias,
        bundle_bytes=ffn.stride + (apart.stride if apart is not None else 0),
    )  # fmt: skip


def _groups(
    tasks: list[LayerTask], tokens: dict[int, int], *, budget: int, floor: int, process: int
) -> list[list[LayerTask]]:
    """Layers of each pass.  Half of what is above the engine's floor is for statistics, the rest
    lets it read in large chunks; the solving afterwards must fit as well."""
    most = max(tasks, key=lambda task: task.streamed_bytes)
    each = LayerStatistics.n_bytes(most.hidden_size, most.n_bundles, tokens)
    working = solving_bytes(most)
    while_reading = (budget - floor) // 2 // each
    while_solving = (budget - process - GROWTH_BYTES - working) // each
    size = min(while_reading, while_solving, len(tasks))
    if size < 1:
        needed = max(floor + 2 * each, process + GROWTH_BYTES + working + each)
        raise BudgetError(budget, needed, f"to fit a layer of {most.n_bundles} neurons")
    n_passes = -(-len(tasks) // size)
    return [part.tolist() for part in np.array_split(np.array(tasks, object), n_passes)]


def solving_bytes(task: LayerTask) -> int:
    """The most that solving one layer holds beside its statistics, measured and rounded up:
    matrices of the inputs' covariance, codes of every number of bits, tables, blocks of rows."""
    hidden, n = task.hidden_size, task.n_bundles
    sample = statistics.sample_tokens(statistics.FITTED, n)
    tables = n * (len(BITS) + 1) * len(GRID) * 20
    blocks = task.block_rows * (16 * hidden * len(BITS) + 48 * sample)
    return 52 * hidden**2 + (len(BITS) + 2) * n * hidden + 8 * sample * hidden + tables + blocks


def _common_bytes(tasks: list[LayerTask]) -> int:
    """What a fit keeps for all of its layers together (Fit.resident_bytes)."""
    n, hidden = max(t.n_bundles for t in tasks), max(t.hidden_size for t in tasks)
    return Scratch.bytes_for(n, hidden)


def _gather(
    model: str, group: list[LayerTask], said, roles, tokens, *, ram_budget, engine, progress, label
) -> dict[int, LayerStatistics]:  # fmt: skip
    """Statistics of the layers of `group`, from one pass over the text."""
    each = [LayerStatistics.n_bytes(t.hidden_size, t.n_bundles, tokens) for t in group]
    found = {
        task.layer: LayerStatistics(task.hidden_size, task.n_bundles, tokens) for task in group
    }
    n_done, n_all = 0, sum(tokens.values())
    with LLM(model, ram_budget=ram_budget, reserve_bytes=sum(each), **engine) as llm:
        for ids, role in zip(said, roles, strict=True):

            def observer(layer, x, decided, role=role) -> None:
                if layer in found:
                    found[layer].add(role, x, decided)

            llm.observe(ids, observer)
            n_done += len(ids)
            if progress is not None:
                progress(n_done, n_all, label)
    return found


def _ascii(text: str) -> str:
    return "".join(c if 32 <= ord(c) < 127 else "?" for c in text)[:MAX_NAME]
