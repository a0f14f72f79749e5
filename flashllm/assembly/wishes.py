"""The engine's settings, each resolved from argument, environment or default, and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..container import Container
from ..engine.drafts import Drafts
from ..errors import UnknownNameError, UsageError
from ..probe.memory import automatic_budget
from ..settings import resolve, usable_processors
from ..units import parse_size

MODES = ("exact", "approx")
KV_TYPES = {"f32": np.float32, "f16": np.float16}


@dataclass(frozen=True)
class Wishes:
    """The engine's settings, each resolved from argument, environment or default."""

    storage: str
    kernels: str
    num_threads: int
    io_depth: int | None
    io_engine: str
    n_context: int | None
    prefill_chunk: int
    kv_type: str
    policy: str
    look_ahead: int
    mode: str
    recall: float
    density: float | None
    audit: int
    speculate: Drafts
    debug: bool
    pin: bool

    @classmethod
    def of(cls, *, pin: bool = True, **given: Any) -> Wishes:
        values = {name: resolve(name, given.get(name)).value for name in cls.__annotations__
                  if name != "pin"}
        values["num_threads"] = values["num_threads"] or usable_processors()
        for name in ("num_threads", "io_depth", "prefill_chunk", "n_context"):
            if name in ("n_context", "io_depth") and values[name] is None:
                continue  # as much as the model and the budget allow; the engine's own depth
            if not isinstance(values[name], int) or values[name] < 1:
                raise UsageError(f"{name} must be a whole number from 1, not {values[name]!r}")
        if values["mode"] not in MODES:
            raise UnknownNameError("mode", values["mode"], list(MODES))
        for name in ("audit", "look_ahead"):
            if not isinstance(values[name], int) or values[name] < 0:
                raise UsageError(f"{name} must be a whole number from 0, not {values[name]!r}")
        if values["kv_type"] not in ("auto", *KV_TYPES):
            raise UsageError(f"kv_type must be auto, f32 or f16, not {values['kv_type']!r}")
        values["speculate"] = Drafts.of(values["speculate"])
        if values["speculate"].most and values["mode"] != "exact":
            raise UsageError("speculate verifies several tokens in one pass, and mode approx "
                             "computes another function for each")  # fmt: skip
        return cls(pin=pin, **values)


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
