"""Fitting predictors to a container, inside a RAM budget: `fit`.

An exact engine reads the text, and what is gathered waits on disk.  Then, the engine being closed,
each layer is surveyed, memory is shared out, and the predictors that were chosen are made one after
another.  The .fit file appears under its name when all of them are in it.
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
from ..container.base import Piece
from ..conversion.from_container import PlaneReader
from ..errors import BudgetError, UsageError
from ..kernels import choose_kernels
from ..planning import GROWTH_BYTES
from ..predictors.fit import fit_path
from ..predictors.header import MAX_NAME, Header
from ..predictors.scores import Scratch
from ..probe.process import return_freed
from ..quant import WEIGHT_TYPES
from ..units import MIB
from . import statistics
from .fit_writer import FitWriter
from .low_rank import largest_rank
from .measuring import Solved, measure, measuring_bytes
from .recording import first_tokens, sparse_layers, windows
from .solving import KINDS, build, choose, solving_bytes, survey
from .spool import FLUSH_BYTES, Spool
from .statistics import LayerStatistics, roles_of
from .tasks import Aims, LayerTask, Option

RECALLS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
SHARE = 0.08  # of the bytes that stream: more would be better spent on caching them
PARTS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5)  # of a layer's fair share of those
WINDOW = 512
LEAST_TOKENS = 64
# What NumPy, the tokenizer and the kernel's bookkeeping of dirty pages hold in passing while a text
# is read; without it a plan that spends the whole budget was killed at 83 % of the text.
PASSING_BYTES = 10 * MIB
LETTERS = 16  # of the text for every token that is wanted: more is not worth tokenizing

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
            "tokens": self.n_tokens, "seconds": self.seconds,
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
    kinds: tuple[str, ...] = tuple(KINDS),
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
    with open_container(model) as container, FitWriter(out) as writer, closing(
        choose_kernels(engine.get("kernels"), n_threads=engine.get("num_threads") or 1)
    ) as kernels, closing(Spool(out.parent)) as spool:
        config, _ = read_config(container)
        engine = {**engine, "n_context": min(window, config.n_context), "mode": "exact"}
        reserve = _gathering_bytes(container)
        with LLM(model, ram_budget=ram_budget, reserve_bytes=reserve, **engine) as llm:
            layers, _ = sparse_layers(llm)
            said = _windows(llm, text, ids, n_tokens)
            roles = roles_of(said)
            tokens = {role: sum(len(w) for w, r in zip(said, roles, strict=True) if r == role)
                      for role in statistics.ROLES}  # fmt: skip
            tasks = [_task(container, config.hidden_size, layer) for layer in layers]
            streamed, common = sum(task.streamed_bytes for task in tasks), _common_bytes(tasks)
            aims = [_aims(task, share, common // len(tasks), float(recall), recalls, kinds, unit)
                    for task in tasks]  # fmt: skip
            _check(tasks, aims, budget=budget_bytes(ram_budget, container.size),
                   process=llm.plan.ledger["process as it stands"])  # fmt: skip
            gathered = {task.layer: LayerStatistics(spool, task.hidden_size, task.n_bundles, tokens)
                        for task in tasks}  # fmt: skip
            spool.require_room()
            _gather(llm, gathered, said, roles, progress)
        return_freed()
        told = _teller(progress, 2 * len(tasks))
        options = []
        for task, aim in zip(tasks, aims, strict=True):
            options.append(survey(task, gathered[task.layer], aim))
            task.rows.let_go()
            told()
        solved, numbers = [], []
        chosen = choose(options, int(share * streamed) - common)
        for task, aim, many, option in zip(tasks, aims, options, chosen, strict=True):
            stats = gathered[task.layer]
            made = build(task, stats, aim, option)
            task.rows.let_go()
            one = measure(made, stats, aim, kernels, _candidates(many, aim))
            numbers.append(writer.add(one.layer, one.section))
            solved.append(replace(one, section=b""))
            del made, one
            told()
        words = text.encode() if text is not None else repr(list(ids)).encode()
        header = writer.commit(Header(
            model=container.digest, hidden_size=config.hidden_size,
            text=hashlib.sha256(words).hexdigest(),
            text_name=_ascii(text_name), n_tokens=sum(tokens.values()), recalls=recalls,
            layers=tuple(one.layer for one in solved),
        ), numbers)  # fmt: skip
    return FitReport(
        path=out, recall=float(recall), recalls=recalls,
        layers=tuple(replace(s, layer=at) for s, at in zip(solved, header.layers, strict=True)),
        resident_bytes=sum(one.resident_bytes for one in solved) + common,
        streamed_bytes=streamed,
        n_tokens=sum(tokens.values()), seconds=time.perf_counter() - started,
    )  # fmt: skip


def _aims(
    task: LayerTask, share: float, common: int, recall: float, recalls, kinds, unit: int
) -> Aims:
    """The layer's fair share of the memory, and parts and multiples of it."""
    fair = int(share * task.streamed_bytes) - common
    return Aims(
        recall=recall, recalls=recalls, budgets=tuple(int(part * fair) for part in PARTS),
        fair=fair, kinds=kinds, unit=unit,
    )  # fmt: skip


def _candidates(options: list[Option], aims: Aims) -> dict[str, dict]:
    """The best of each kind at the fair share."""
    fair = [one for one in options if one.budget == aims.fair]
    return {kind: min((one for one in fair if one.kind == kind), key=lambda one: one.cost).figures()
            for kind in {one.kind for one in fair}}  # fmt: skip


def _teller(progress: Progress | None, n_all: int) -> Callable[[], None]:
    n_done = 0

    def told() -> None:
        nonlocal n_done
        n_done += 1
        if progress is not None:
            progress(n_done, n_all, "layers")

    return told


def _windows(llm: LLM, text: str | None, ids: Sequence[int] | None, most: int) -> list[np.ndarray]:
    """Contexts of token ids, `most` tokens in all."""
    if text is not None:
        found = windows(llm, text[: LETTERS * most], window=None)
    else:
        size = llm.n_context
        found = (np.array(ids[at : at + size], np.int32) for at in range(0, len(ids), size))
    taken = list(first_tokens(found, most))
    n = sum(map(len, taken))
    if n < LEAST_TOKENS or len(taken) < 3:
        raise UsageError(
            f"{n} tokens in {len(taken)} contexts are too few to fit to: {LEAST_TOKENS} in 3 at "
            "least, thousands to be of use"
        )
    return taken


class _Rows:
    """Rows of a deciding matrix, held as they are stored from the first use until `let_go`: all of
    them are looked at seven times, and where frames are single neurons each look takes seconds."""

    def __init__(self, reader: PlaneReader, piece: Piece):
        self._reader, self._piece = reader, piece
        self._raw: np.ndarray | None = None
        self.n_bytes = reader.plane.n_items * piece.row_bytes

    def __call__(self, first: int, stop: int) -> np.ndarray:
        if self._raw is None:
            self._raw = self._reader.items(self._piece, 0, self._reader.plane.n_items)
        return WEIGHT_TYPES[self._piece.weight_type].decode(
            self._raw[first:stop], self._piece.n_cols
        )

    def let_go(self) -> None:
        self._raw = None


def _task(container: Container, hidden_size: int, layer: int) -> LayerTask:
    """What a layer's fitting reads from the container, however it arranges a neuron's pieces."""
    planes, prefix = container.planes, f"layers.{layer}."
    ffn, apart = planes[prefix + "ffn"], planes.get(prefix + "deciding")
    plane = ffn if apart is None else apart
    names = [piece.name for piece in plane.pieces]
    name = next(name for name in ("row", "gate", "up") if name in names)
    rows = _Rows(PlaneReader(plane, container), plane.piece(name))
    # Where the deciding row lies in the bundle its bias has the name of the piece.
    bias_name = prefix + ("deciding.bias" if apart is not None else f"{name}.bias")
    bias = container.load_vectors()[bias_name] if bias_name in container.vectors else None

    return LayerTask(
        layer=layer, n_bundles=ffn.n_items, hidden_size=hidden_size, rows=rows, bias=bias,
        bundle_bytes=ffn.stride + (apart.stride if apart is not None else 0),
    )  # fmt: skip


def _check(tasks: list[LayerTask], aims: list[Aims], *, budget: int, process: int) -> None:
    """BudgetError unless every layer can be solved when the engine is gone."""
    solving = max(_solving_bytes(task, aim) for task, aim in zip(tasks, aims, strict=True))
    counts = LayerStatistics.n_bytes(sum(task.n_bundles for task in tasks))
    needed = process + GROWTH_BYTES + counts + solving
    if needed > budget:
        most = max(task.n_bundles for task in tasks)
        raise BudgetError(budget, needed, f"to fit a layer of {most} neurons")


def _gathering_bytes(container: Container) -> int:
    """What is held while the text is read, and what waits to be written."""
    neurons = sum(plane.n_items for name, plane in container.planes.items()
                  if name.endswith(".ffn"))  # fmt: skip
    return LayerStatistics.n_bytes(neurons) + 2 * FLUSH_BYTES + PASSING_BYTES


def _solving_bytes(task: LayerTask, aims: Aims) -> int:
    """The most that one layer's survey, making or measuring holds."""
    rank = largest_rank(task, aims)
    section = 3 * aims.budgets[-1]
    measuring = section + measuring_bytes(task.n_bundles, task.hidden_size)
    return max(solving_bytes(task, rank) + section + task.rows.n_bytes, measuring)


def _common_bytes(tasks: list[LayerTask]) -> int:
    """What a fit keeps for all of its layers together (Fit.resident_bytes)."""
    n, hidden = max(t.n_bundles for t in tasks), max(t.hidden_size for t in tasks)
    return Scratch.bytes_for(n, hidden)


def _gather(llm: LLM, found: dict[int, LayerStatistics], said, roles, progress) -> None:
    """Statistics of all layers, from one pass over the text."""
    n_done, n_all = 0, sum(len(ids) for ids in said)
    for ids, role in zip(said, roles, strict=True):

        def observer(layer, x, decided, role=role) -> None:
            if layer in found:
                found[layer].add(role, x, decided)

        llm.observe(ids, observer)
        n_done += len(ids)
        if progress is not None:
            progress(n_done, n_all, "text")


def _ascii(text: str) -> str:
    return "".join(c if 32 <= ord(c) < 127 else "?" for c in text)[:MAX_NAME]
