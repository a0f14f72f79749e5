"""From a container and the wishes to a byte plan: what each part costs, which plane is kept when,
and what a budget must at least be.  The spending itself is planning.py's."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from ..cache.ledger import THREAD_BYTES
from ..container import Container
from ..errors import BudgetError, UsageError
from ..offload import routed_planes, store_costs
from ..planning import (
    GROWTH_BYTES,
    RESULT_BYTES,
    STAGE_BYTES,
    Costs,
    Plan,
    PlaneNeed,
    plan_budget,
    replan,
)
from ..storage import STORAGES, THREADS
from ..tracing.activity import BLOB, decode_activity
from ..units import align_up
from ..watch import MemoryWatch
from .predicting import Predicting, acquired_planes
from .wishes import Wishes, kv_dtype


def make_plan(
    container: Container,
    config: Any,
    model_class: Any,
    kernels: Any,
    wishes: Wishes,
    budget: int,
    *,
    process_bytes: int,
    predicted: Predicting | None = None,
    reserve_bytes: int = 0,
    backend: str | None = None,
) -> Plan:
    """The byte plan of this container under `budget`; see planning.plan_budget.

    `backend` reads the file: the one that was asked for, or until one is chosen `direct`.
    Predictors are always in memory.  Of what they name deciding rows are as good as bundles.
    """
    dtype = kv_dtype(wishes, container)
    acquired = acquired_planes(container, predicted)
    picked = routed_planes(container) | (predicted.planes() if predicted else set())
    costs_of_store = store_costs(container, stage_bytes=STAGE_BYTES, sparse=acquired)
    embed = container.planes["embed"]
    vector_bytes = 4 * sum(int(np.prod(shape)) for shape, *_ in container.vectors.values())

    def context_bytes(n: int) -> int:
        return model_class.context_bytes(config, n, dtype, kernels)

    def chunk_bytes(n: int) -> int:
        return model_class.chunk_bytes(config, n, kernels, embed.stride)

    if backend is None:
        backend = wishes.storage if wishes.storage in STORAGES else "direct"
    longest = max(STAGE_BYTES, *(plane.frame_bytes for plane in container.planes.values()))
    readers = wishes.io_depth or THREADS
    passing = min(STORAGES[backend].cached_bytes(readers, longest), container.size)
    activity = {}
    if BLOB in container.blobs:
        activity = decode_activity(container.path, container.read_blob(BLOB))
    needs = [
        PlaneNeed(name, plane.n_frames, align_up(plane.frame_bytes, container.alignment),
                  rank_of(name, container, acquired), config.share_read(name),
                  picked=name in picked,
                  use=activity.get(name.replace(".deciding", ".ffn")) if name in acquired else None)
        for name, plane in container.planes.items()
    ]  # fmt: skip
    each_guess = 4 * config.vocab_size + model_class.mark_bytes(config)
    guessed = wishes.speculate.most * each_guess
    most = min(config.n_context, 4096) if model_class.bounded_context else config.n_context
    wish = most if wishes.n_context is None else wishes.n_context
    if wish > config.n_context:
        raise UsageError(f"n_context {wish} exceeds the model's {config.n_context}")
    return plan_budget(
        budget_bytes=budget,
        needs=needs,
        costs=Costs(
            fixed={
                "process as it stands": process_bytes,
                "growth of the interpreter": GROWTH_BYTES,
                "results": RESULT_BYTES + 4 * config.vocab_size,
                "vectors": vector_bytes,
                # With a ring (73 KiB, its thread too) fewer of these start.
                "reader threads": readers * THREAD_BYTES,
                "compute threads": wishes.num_threads * THREAD_BYTES,
                **({"drafts": guessed} if guessed else {}),
                **({"page cache in passing": passing} if passing else {}),
                **({"predictors": predicted.n_bytes} if predicted and predicted.layers else {}),
                **({"held by the caller": reserve_bytes} if reserve_bytes else {}),
                **costs_of_store.fixed,
            },
            context=context_bytes,
            chunk=chunk_bytes,
            stage=costs_of_store.stage,
        ),
        n_context=wish,
        context_is_wish=wishes.n_context is None,
        chunk=wishes.prefill_chunk,
        file_bytes=container.size,
        keep=wishes.pin,
    )


def rank_of(name: str, container: Container, acquired: Collection[str]) -> int | None:
    """The class of a plane (planning.LABELS): -1 routers, 0 attention and head, 1 deciding, 2 FFN
    or experts; None is read by the row.  A layer's FFN beside experts is as much in need as 0, and
    deciding rows of which only some are `acquired` no more than bundles.
    """
    if name == "position" or (name == "embed" and "head" in container.planes):
        return None
    last = name.rsplit(".", 1)[-1]
    if last == "deciding" and name in acquired:
        return 2
    if last in ("gate", "up", "down") and name.rpartition(".")[0] + ".down" in container.planes:
        last = "ffn"  # by rows
    if last == "ffn" and any(other.endswith(".router") for other in container.planes):
        return 0
    return {"router": -1, "deciding": 1, "ffn": 2, "experts": 2, "neurons": 2}.get(last, 0)


def floor_of(*arguments: Any, **more: Any) -> int:
    """The smallest budget that make_plan accepts."""
    try:
        make_plan(*arguments, 1, **more)
    except BudgetError as error:
        return error.floor_bytes
    raise AssertionError("a budget of one byte was accepted")


def open_floor(opened: Plan) -> int:
    """The smallest budget that an engine opened with this plan can be resized to."""
    try:
        replan(opened, 1)
    except BudgetError as error:
        return error.floor_bytes
    raise AssertionError("a budget of one byte was accepted")


def admit_result(plan: Plan, memory: MemoryWatch, n_bytes: int) -> None:
    """BudgetError unless a result of `n_bytes` fits beside what the process uses now."""
    lines = plan.ledger.lines()
    if n_bytes <= RESULT_BYTES + lines.get("unused", 0):
        return
    needed = memory.rss() + n_bytes
    if needed > plan.ledger.budget_bytes:
        raise BudgetError(plan.ledger.budget_bytes, needed, "for a result of this size")
