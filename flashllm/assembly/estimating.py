"""What a run would need and could reach, without loading anything."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ..container import open_container
from ..kernels import choose_kernels
from ..planning import Plan
from ..probe.process import interpreter_bytes
from .opening import choose_backend, load_tokenizer, read_config
from .plan import floor_of, make_plan
from .predicting import predicting
from .wishes import Wishes, budget_bytes


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
    every token, of experts as many as the router chooses (a sparse FFN reads less, so do experts
    chosen again while they are cached, and sequences shorter than the context, which lend the rest
    of its memory to weights); None when nothing has to be read.
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
    choice = choose_backend(path, wishes.storage, engine=wishes.io_engine)
    speed = choice.curve.sequential_bytes_per_s
    streamed = plan.bytes_per_token
    return Estimate(
        plan=plan,
        floor_bytes=floor,
        device=f"{choice.name}: {choice.why}",
        read_tokens_per_s=speed / streamed if streamed else None,
    )
