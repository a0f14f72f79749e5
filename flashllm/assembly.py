"""How the parts are put together: the helper of `api`, and of the verbs that only plan.

Everything opened here is put on the caller's ExitStack in order, so that it closes in reverse.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .container import Container, open_container
from .errors import BudgetError, FormatError, UnknownNameError, UsageError
from .floors import Floors, Touched
from .kernels import choose_kernels
from .models.approximate import Approximation
from .models.configs import config_from_dict
from .models.families import MODELS
from .models.scratch import Scratch
from .offload import WeightStore, sparse_planes, store_costs
from .planning import (
    GROWTH_BYTES,
    RESULT_BYTES,
    STAGE_BYTES,
    THREAD_BYTES,
    Costs,
    Plan,
    PlaneNeed,
    plan_budget,
    replan,
    ring_reserve,
)
from .predictors import Predictor
from .predictors.fit import Fit, fit_extents, fit_path, is_fit_blob, open_fit
from .predictors.magnitude import density_path, read_magnitudes
from .probe.curve import DEFAULT_CURVE
from .probe.device import Choice, choose_storage, probe_device
from .probe.memory import automatic_budget
from .probe.process import drop_library_cache, interpreter_bytes
from .settings import resolve, usable_processors
from .storage import STORAGES, open_storage
from .units import align_up, parse_size
from .watch import MemoryWatch

MODES = ("exact", "approx")
KV_TYPES = {"f32": np.float32, "f16": np.float16}


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
    model: Any
    state: Any
    memory: MemoryWatch
    check: Callable[[], None] | None


@dataclass(frozen=True)
class Wishes:
    """The engine's settings, each resolved from argument, environment or default."""

    storage: str
    kernels: str
    num_threads: int
    io_depth: int
    n_context: int | None
    prefill_chunk: int
    kv_type: str
    policy: str
    mode: str
    recall: float
    density: float | None
    audit: int
    debug: bool
    pin: bool

    @classmethod
    def of(cls, *, pin: bool = True, **given: Any) -> Wishes:
        values = {name: resolve(name, given.get(name)).value for name in cls.__annotations__
                  if name != "pin"}
        values["num_threads"] = values["num_threads"] or usable_processors()
        for name in ("num_threads", "io_depth", "prefill_chunk"):
            if not isinstance(values[name], int) or values[name] < 1:
                raise UsageError(f"{name} must be a whole number from 1, not {values[name]!r}")
        if values["mode"] not in MODES:
            raise UnknownNameError("mode", values["mode"], list(MODES))
        if not isinstance(values["audit"], int) or values["audit"] < 0:
            raise UsageError(f"audit must be a whole number from 0, not {values['audit']!r}")
        if values["kv_type"] not in ("auto", *KV_TYPES):
            raise UsageError(f"kv_type must be auto, f32 or f16, not {values['kv_type']!r}")
        return cls(pin=pin, **values)


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
    choice = choose_backend(path, wishes.storage, streams=plan.streamed_bytes > 0)
    if wishes.storage == "auto" and choice.name != "direct":
        plan = make_plan(*arguments, backend=choice.name, **known)
    if on_plan is not None:
        on_plan(plan)
    storage = open_storage(choice.name, path, depth=wishes.io_depth)
    stack.callback(storage.close)
    store = WeightStore(
        container,
        storage,
        resident=plan.resident,
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
    state = model.new_state(plan.n_context, kv_dtype(wishes, container))
    return Parts(
        container=container, config=config, plan=plan, tokenizer=tokenizer, store=store,
        kernels=kernels, choice=choice, model=model, state=state, memory=memory,
        check=store.check if wishes.debug else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Predicting:
    """What decoding leaves out, as a plan sees it: predictors (of which layers, how many bytes, and
    how to load them), or thresholds of magnitude by layer."""

    layers: tuple[int, ...] = ()
    n_bytes: int = 0
    load: Callable[[], Mapping[int, Predictor]] = dict
    thresholds: Mapping[int, float] = field(default_factory=dict)

    def planes(self) -> set[str]:
        return {f"layers.{i}.{part}" for i in self.layers for part in ("deciding", "ffn")}


def predicting(
    path: str,
    container: Container,
    config: Any,
    kernels: Any,
    wishes: Wishes,
    predictors: Mapping[int, Predictor] | None,
) -> Predicting | None:
    """What names the neurons that decoding computes: nothing (None) in exact mode; in approximate
    mode the `predictors` given, or those fitted to this container; or, where no neuron is ever
    exactly zero, thresholds for the density asked for."""
    if wishes.mode == "exact":
        if predictors:
            raise UsageError("predictors decide nothing in exact mode: ask for mode approx")
        return None
    if not config.sparse:
        return Predicting(thresholds=_thresholds(path, container, config, wishes, predictors))
    if wishes.density is not None:
        raise UsageError(f"{container.path}: density is for models without exact zeros; with "
                         f"{config.activation} ask for a recall")
    sizes = {
        i: plane.n_items for i in range(config.n_layers)
        if (plane := container.planes.get(f"layers.{i}.ffn")) is not None
    }  # fmt: skip
    if predictors is None:
        fit = find_fit(path, container)
        fit.require_shape(config.hidden_size, sizes)
        fit.place(wishes.recall)
        return Predicting(
            tuple(layer.layer for layer in fit.layers), fit.resident_bytes,
            lambda: fit.load(kernels, wishes.recall),
        )  # fmt: skip
    for layer, predictor in predictors.items():
        if layer not in sizes:
            raise UsageError(f"a predictor for layer {layer}, which has no FFN of neurons")
        if predictor.n_bundles != sizes[layer]:
            raise UsageError(f"the predictor of layer {layer} knows {predictor.n_bundles} bundles, "
                             f"the layer has {sizes[layer]}")
    n_bytes = sum(predictor.resident_bytes for predictor in predictors.values())
    return Predicting(tuple(predictors), n_bytes, lambda: predictors)


def _thresholds(path, container, config, wishes: Wishes, predictors) -> dict[int, float]:
    """Layer -> threshold of a model whose neurons are never exactly zero."""
    if wishes.density is None or predictors:
        raise UsageError(
            f"{container.path}: with {config.activation} no neuron is exactly zero: approximate "
            "mode needs a density (calibration.density finds its thresholds), not a recall"
        )
    found = read_magnitudes(density_path(path))
    found.require(density_path(path), container.digest)
    chosen = found.thresholds(wishes.density)
    for layer in chosen:
        if f"layers.{layer}.deciding" not in container.planes:
            raise FormatError(density_path(path), f"layer {layer}", "a layer with a deciding plane",
                              "none")  # fmt: skip
    return chosen


def find_fit(path: str, container: Container) -> Fit:
    """The predictors beside a container, or else inside it; UsageError where there are none."""
    if fit_path(path).exists():
        fit = open_fit(fit_path(path))
        fit.require(container.digest)
        return fit
    extents = fit_extents({name: (b.offset, b.n_bytes) for name, b in container.blobs.items()})
    if not extents:
        raise UsageError(f"approximate mode needs predictors, and there is no {fit_path(path)}: "
                         "flashllm fit makes it")
    return open_fit(path, extents=extents)


def acquired_planes(container: Container, predicted: Predicting | None) -> set[str]:
    """Planes of which single items are asked for: where sets are predicted, deciding rows too."""
    planes = sparse_planes(container)
    return planes if predicted is None else planes | predicted.planes() & set(container.planes)


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
    """The family's config and model class of a container."""
    config = config_from_dict(container.family, container.config, path=container.path)
    return config, MODELS[container.family]


def choose_backend(path: str, name: str, *, streams: bool = True) -> Choice:
    """The backend to read with: as asked, or by a probe when `auto`.

    Where something `streams` the device's curve is measured either way, because the planner of
    sparse reads asks it; where all is kept, a third of a second of probing would buy nothing.
    """
    if name != "auto" and name not in STORAGES:
        raise UnknownNameError("storage", name, ["auto", *STORAGES])
    curve = None if streams else DEFAULT_CURVE
    if name == "auto":
        return choose_storage(path, curve=curve)
    return Choice(name, "asked for", curve or probe_device(path, name))


def budget_bytes(ram_budget: int | str | None, file_bytes: int) -> int:
    """The budget in bytes: asked for, from the environment, or what this machine leaves us."""
    asked = resolve("ram_budget", ram_budget).value
    if asked is None:
        return automatic_budget().n_bytes
    return parse_size(asked, whole_bytes=file_bytes)


def kv_dtype(wishes: Wishes, container: Container) -> type:
    """f16 beside quantised weights, f32 beside float ones, unless asked otherwise.

    It never depends on the budget: a cap must not change a token.  f16 keys and values cost about
    3e-3 of a logit, less than int8 weights do and far more than float weights are held to (1e-4).
    """
    if wishes.kv_type != "auto":
        return KV_TYPES[wishes.kv_type]
    first = next((p for name, p in container.planes.items() if name.endswith(".qkv")), None)
    quantised = first is not None and first.pieces[0].weight_type in ("int8", "int4")
    return np.float16 if quantised else np.float32


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
    widths = model_class.scratch_widths(config)
    widest = model_class.widest_input(config)
    dtype = kv_dtype(wishes, container)
    acquired = acquired_planes(container, predicted)
    costs_of_store = store_costs(container, stage_bytes=STAGE_BYTES, sparse=acquired)
    embed = container.planes["embed"]
    vector_bytes = 4 * sum(int(np.prod(shape)) for shape, *_ in container.vectors.values())

    def context_bytes(n: int) -> int:
        return model_class.context_bytes(config, n, dtype, kernels)

    def chunk_bytes(n: int) -> int:
        return (Scratch.bytes_needed(widths, n) + kernels.activation_bytes(n, widest)
                + n * embed.stride + 4 * config.hidden_size * n)  # fmt: skip

    if backend is None:
        backend = wishes.storage if wishes.storage in STORAGES else "direct"
    passing = min(STORAGES[backend].cached_bytes(wishes.io_depth, STAGE_BYTES), container.size)
    needs = [
        PlaneNeed(name, plane.n_frames, align_up(plane.frame_bytes, container.alignment),
                  rank_of(name, container, acquired), config.share_read(name),
                  picked=predicted is not None and name in predicted.planes())
        for name, plane in container.planes.items()
    ]  # fmt: skip
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
                "reader threads": wishes.io_depth * THREAD_BYTES,
                "compute threads": wishes.num_threads * THREAD_BYTES,
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
    if last == "ffn" and any(other.endswith(".router") for other in container.planes):
        return 0
    return {"router": -1, "deciding": 1, "ffn": 2, "experts": 2, "neurons": 2}.get(last, 0)


def load_tokenizer(container: Container, config: Any):
    """The carried tokenizer, or None when the container has none."""
    from .tokenization import Tokenizer

    blobs = {name: container.read_blob(name) for name in container.blobs if not is_fit_blob(name)}
    return Tokenizer.from_blobs(blobs, path=container.path, bos_id=config.bos_id)


def generation_config(container: Container) -> dict[str, Any]:
    """The model's generation_config.json, {} when it has none."""
    if "generation_config.json" not in container.blobs:
        return {}
    try:
        config = json.loads(container.read_blob("generation_config.json"))
    except ValueError as error:
        raise FormatError(container.path, "generation_config.json", "JSON", error) from None
    if not isinstance(config, dict):
        raise FormatError(container.path, "generation_config.json", "an object", config)
    return config


def admit_result(plan: Plan, memory: MemoryWatch, n_bytes: int) -> None:
    """BudgetError unless a result of `n_bytes` fits beside what the process uses now."""
    lines = plan.ledger.lines()
    if n_bytes <= RESULT_BYTES + lines.get("unused", 0):
        return
    needed = memory.rss() + n_bytes
    if needed > plan.ledger.budget_bytes:
        raise BudgetError(plan.ledger.budget_bytes, needed, "for a result of this size")


@dataclass(frozen=True)
class Estimate:
    """What a run would need and could reach, from sizes and the device curve alone."""

    plan: Plan
    floor_bytes: int
    device: str
    read_tokens_per_s: float | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "ledger": self.plan.ledger.lines(),
            "ram_budget": self.plan.ledger.budget_bytes,
            "floor_bytes": self.floor_bytes,
            "n_context": self.plan.n_context,
            "streamed_bytes_per_token": self.plan.bytes_per_token,
            "device": self.device,
            "read_tokens_per_s": self.read_tokens_per_s,
        }


def estimate(path: str, *, ram_budget: int | str | None = None, **given: Any) -> Estimate:
    """Plan `path` without loading it.

    `read_tokens_per_s` is what the device allows when everything that is not kept is read for
    every token, of experts as many as the router chooses (a sparse FFN reads less, and so do
    experts chosen again while they are cached); None when nothing has to be read.
    """
    wishes = Wishes.of(**given)
    with ExitStack() as stack:
        container = stack.enter_context(open_container(path))
        config, model_class = read_config(container)
        kernels = choose_kernels(wishes.kernels, n_threads=1)
        stack.callback(kernels.close)
        load_tokenizer(container, config)
        arguments = (container, config, model_class, kernels, wishes)
        process = interpreter_bytes()
        predicted = predicting(path, container, config, kernels, wishes, None)
        floor = floor_of(*arguments, process_bytes=process, predicted=predicted)
        budget = budget_bytes(ram_budget, container.size)
        plan = make_plan(*arguments, budget, process_bytes=process, predicted=predicted)
    choice = choose_backend(path, wishes.storage)
    speed = choice.curve.sequential_bytes_per_s
    streamed = plan.bytes_per_token
    return Estimate(
        plan=plan,
        floor_bytes=floor,
        device=f"{choice.name}: {choice.why}",
        read_tokens_per_s=speed / streamed if streamed else None,
    )


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
