"""Opening a container as an engine's parts: planned, allocated, not loaded yet.

Everything opened here is put on the caller's ExitStack in order, so that it closes in reverse.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ..checkpoints.files import MAX_CONFIG_BYTES
from ..container import Container, open_container
from ..engine.drafts import Drafts
from ..engine.sampling import SamplingParams
from ..errors import FormatError, UnknownNameError, UsageError
from ..floors import Floors, Touched
from ..kernels import choose_kernels
from ..models.approximate import Approximation
from ..models.configs import config_from_dict
from ..models.families import MODELS
from ..models.look_ahead import LookAhead
from ..models.moe import MoEModel
from ..models.shapes import check_shapes
from ..offload import WeightStore
from ..planning import Plan, lending, ring_reserve
from ..predictors import Predictor
from ..probe.curve import DEFAULT_CURVE
from ..probe.device import Choice, choose_storage, probe_device
from ..probe.process import drop_library_cache, interpreter_bytes
from ..storage import STORAGES, open_storage
from ..watch import MemoryWatch
from .plan import make_plan
from .predicting import acquired_planes, predicting
from .wishes import Wishes, budget_bytes, kv_dtype


@dataclass
class Parts:
    """An assembled engine's parts."""

    container: Container
    config: Any
    plan: Plan
    tokenizer: Any
    store: WeightStore
    kernels: Any
    choice: Choice
    io_engine: str  # that reads: uring or threads
    model: Any
    state: Any
    kv_dtype: type  # of the state, where it grows
    drafts: Drafts
    memory: MemoryWatch
    check: Callable[[], None] | None


def open_parts(
    path: str,
    stack: ExitStack,
    *,
    ram_budget: int | str | None = None,
    predictors: Mapping[int, Predictor] | None = None,
    reserve_bytes: int = 0,
    on_plan: Callable[[Plan], None] | None = None,
    **given: Any,
) -> Parts:
    """Open `path` inside a budget: planned, allocated, not loaded yet."""
    wishes = Wishes.of(**given)
    container = stack.enter_context(open_container(path))
    config, model_class = read_config(container)
    kernels = choose_kernels(wishes.kernels, n_threads=wishes.num_threads)
    stack.callback(kernels.close)
    budget = budget_bytes(ram_budget, container.size)
    tokenizer = load_tokenizer(container, config)
    drop_library_cache()
    predicted = predicting(path, container, config, kernels, wishes, predictors)
    arguments = (container, config, model_class, kernels, wishes, budget)
    known = {"process_bytes": interpreter_bytes(), "predicted": predicted,
             "reserve_bytes": reserve_bytes}  # fmt: skip
    plan = make_plan(*arguments, **known)
    memory = MemoryWatch()
    choice = choose_backend(path, wishes.storage, streams=plan.streamed_bytes > 0,
                            engine=wishes.io_engine)  # fmt: skip
    if wishes.storage == "auto" and choice.name != "direct":
        plan = make_plan(*arguments, backend=choice.name, **known)
    plan = lending(plan, "state", "scratch")
    if on_plan is not None:
        on_plan(plan)
    storage = open_storage(choice.name, path, depth=wishes.io_depth, engine=wishes.io_engine)
    stack.callback(storage.close)
    container.check_same_file(storage.fileno())  # the path was opened twice
    store = WeightStore(
        container,
        storage,
        resident=plan.resident,
        most=plan.most,
        ring_stages=plan.ring_stages,
        ring_reserve=ring_reserve(plan),
        stage_bytes=plan.stage_bytes,
        policy=wishes.policy,
        curve=choice.curve,
        sparse=acquired_planes(container, predicted),
        begin_cached=predicted is not None,
        debug=wishes.debug,
    )
    stack.callback(store.close)
    model = model_class(
        config, container.planes, container.load_vectors(), store, kernels,
        max_tokens=plan.chunk, n_context=plan.n_context, path=path,
    )  # fmt: skip
    if predicted is not None:
        model.approximation = Approximation(
            predicted.load(), predicted.thresholds, audit_every=wishes.audit
        )
    if wishes.look_ahead and isinstance(model, MoEModel):
        model.look_ahead = LookAhead(config.n_layers, wishes.look_ahead)
    dtype = kv_dtype(wishes, container)
    state = model.new_state(plan.n_context, dtype, held=0 if plan.lends else None)
    return Parts(
        container=container, config=config, plan=plan, tokenizer=tokenizer, store=store,
        kernels=kernels, choice=choice, io_engine=storage.engine, model=model,
        state=state, kv_dtype=dtype, drafts=wishes.speculate, memory=memory,
        check=store.check if wishes.debug else None,
    )  # fmt: skip


def make_floors(parts: Parts) -> Floors:
    """What DRAM and the device allow this engine; see floors.py."""
    planes, state = parts.container.planes, parts.state
    sparse = parts.store.sparse_names
    fixed = sum(
        planes[name].n_items * planes[name].stride
        for name in parts.model.order() if name not in sparse
    )
    bundles = sum(planes[name].n_items for name in sparse)
    held = [sum(array.nbytes for array in state.holding(n).values()) for n in (0, 1)]
    touched = Touched(
        fixed=fixed + held[0],
        per_bundle=sum(planes[n].n_items * planes[n].stride for n in sparse) / max(1, bundles),
        per_position=held[1] - held[0],
    )
    return Floors(parts.choice.curve, touched, parts.store.memory, parts.kernels.n_threads)


def read_config(container: Container):
    """The family's config and model class of a container whose planes and vectors are theirs."""
    config = config_from_dict(container.family, container.config, path=container.path)
    check_shapes(config, container.planes, container.vectors, container.path)
    return config, MODELS[container.family]


def choose_backend(
    path: str, name: str, *, streams: bool = True, engine: str = "threads"
) -> Choice:
    """The backend to read with: as asked, or by a probe when `auto`.

    Where something `streams` the device's curve is measured either way, because the planner of
    sparse reads asks it; where all is kept, a third of a second of probing would buy nothing.
    """
    if name != "auto" and name not in STORAGES:
        raise UnknownNameError("storage", name, ["auto", *STORAGES])
    curve = None if streams else DEFAULT_CURVE
    if name == "auto":
        return choose_storage(path, curve=curve, engine=engine)
    return Choice(name, "asked for", curve or probe_device(path, name, engine=engine))


def load_tokenizer(container: Container, config: Any):
    """The carried tokenizer, or None when the container has none."""
    from ..tokenization import FILES, Tokenizer

    # Nothing else that is carried is read: it could be as large as the budget.
    blobs = {name: container.read_blob(name) for name in FILES if name in container.blobs}
    return Tokenizer.from_blobs(blobs, path=container.path, bos_id=config.bos_id)


def generation_config(container: Container) -> dict[str, Any]:
    """The model's generation_config.json, {} when it has none; FormatError for one that cannot be
    sampled by."""
    name = "generation_config.json"
    if name not in container.blobs:
        return {}
    n_bytes = container.blobs[name].n_bytes
    if n_bytes > MAX_CONFIG_BYTES:
        raise FormatError(container.path, name, f"at most {MAX_CONFIG_BYTES} bytes", n_bytes)
    try:
        config = json.loads(container.read_blob(name))
    except (ValueError, RecursionError) as error:
        raise FormatError(container.path, name, "JSON", str(error)[:80]) from None
    if not isinstance(config, dict):
        raise FormatError(container.path, name, "an object", type(config).__name__)
    try:
        SamplingParams(seed=0).resolved(config)
    except UsageError as error:
        raise FormatError(container.path, name, "numbers to sample with", error) from None
    return config
