"""Engines whose plan is forced: for models so small that a real budget would keep all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flashllm import LLM, assembly, convert
from flashllm.models.repeats import Repeats
from flashllm.offload import WeightStore
from flashllm.units import KIB

from .rwkv_models import exported, official, written
from .tiny import container


def small_frames(folder: Path, variant: str) -> Path:
    """A container of many small frames: a golden variant, or a random "rwkv-VERSION"."""
    if not variant.startswith("rwkv-"):
        return container(folder, variant, tokenizer=False, quant="int8", frame_bytes=512)
    version = variant.removeprefix("rwkv-")
    source = written(folder / "m.bin", exported(official(version), version))
    convert(source, folder / "m.flash", frame_bytes=512)
    return folder / "m.flash"


def opened(
    path, monkeypatch, *, share: float = 1.0, whole: str = "none", store: dict | None = None,
    stage_bytes: int = 256 * KIB, **settings,
) -> LLM:  # fmt: skip
    """An engine with `share` of every plane kept and, below 1, a ring of 4 small stages.  `whole`:
    planes whose names end so are kept whole.  `store`: more arguments of its WeightStore."""
    plan_budget = assembly.plan.plan_budget

    def forced(**arguments):
        plan = plan_budget(**arguments)
        resident = {
            n.name: int(n.n_frames * (1 if n.name.endswith(whole) else share))
            for n in arguments["needs"]
        }
        return dataclasses.replace(
            plan, resident=resident, most=resident, ring_stages=4 if share < 1 else 0,
            stage_bytes=stage_bytes,
        )  # fmt: skip

    class Store(WeightStore):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, **(store or {}))

    with monkeypatch.context() as patch:
        patch.setattr(assembly.plan, "plan_budget", forced)
        patch.setattr(assembly.opening, "lending", lambda plan, *_: plan)  # it would keep more
        patch.setattr(assembly.opening, "WeightStore", Store)
        return LLM(str(path), **{"debug": True, **settings})


def nothing_recorded(monkeypatch) -> None:
    """Every token goes through the interpreter, each layer as if weights could be missing."""

    def plainly(self, model, state, key, parts, live):
        for part in parts(plainly=True):
            part.run(model, state=state)

    monkeypatch.setattr(Repeats, "run", plainly)
