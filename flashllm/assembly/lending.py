"""What kept weights lend to a request: room for the states of a list of prompts.

Plans only; the engine follows them and comes back to the plan it was opened with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.group import Group
from ..errors import BudgetError
from ..planning import Plan, needing_more, replan
from .opening import Parts

STATES = "states of a list of prompts"


@dataclass(frozen=True)
class Lending:
    """Of one engine; `opened` is always the plan it was opened with, `budget` the present one."""

    parts: Parts

    def with_states(self, opened: Plan, requests: Sequence[Any]) -> Plan:
        """`opened` with what these requests take together: a state for each but the last, which
        has the engine's own."""
        model, config, dtype = self.parts.model, self.parts.config, self.parts.kv_dtype
        states = [model.state_bytes(config, one.n_positions, dtype) for one in requests[:-1]]
        n_bytes = sum(states) + Group.logit_bytes(len(requests), config.vocab_size)
        return needing_more(opened, STATES, n_bytes, note=f"{len(requests)} sequences")

    def fitting(
        self, opened: Plan, budget: int, requests: Sequence[Any]
    ) -> tuple[int, str | None]:
        """How many of these can run together, and the setting that stands against more."""
        if self.parts.model.approximation is not None:
            return 1, "mode" if len(requests) > 1 else None
        most = min(len(requests), opened.chunk)
        limit = "prefill_chunk" if most < len(requests) else None
        for n in range(most, 1, -1):
            if _replanned(self.with_states(opened, requests[:n]), budget) is not None:
                return n, limit
            limit = "ram_budget"
        return 1, limit


def _replanned(opened: Plan, budget: int) -> Plan | None:
    try:
        return replan(opened, budget)
    except BudgetError:
        return None
