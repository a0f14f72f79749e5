"""What kept weights lend to a request: room for the states of a list of prompts, and for wide
passes over a long one.

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

STATES, SCRATCH = "states of a list of prompts", "scratch of a long prompt"
WORTH = 0.9  # wide passes must spare a tenth of the reads: taking room has a cost of its own


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

    def widest(self, opened: Plan, now: Plan, n_ids: int) -> tuple[int, Plan | None]:
        """Tokens in a pass with which a prompt makes the device read least, and `opened` with room
        for them; None where the room there is does about as well.  `now` is the present plan."""
        room, streamed = opened.chunk, now.streamed_bytes
        n_least = -(-n_ids // room)  # passes in the present room
        best, least = (room, None), WORTH * streamed * n_least
        for n_passes in range(1, n_least if streamed else 1):
            wide = -(-n_ids // n_passes)
            if wide > self.parts.widest_chunk:
                continue
            wider = needing_more(opened, SCRATCH, self._scratch_bytes(wide),
                                 note=f"{wide} tokens at once")  # fmt: skip
            plan = _replanned(wider, now.ledger.budget_bytes)
            if plan is None:
                continue
            # Every pass reads what was given up, and it has to come back in the end.
            lost = plan.streamed_bytes - streamed
            n_bytes = n_passes * (streamed + lost) + lost
            if n_bytes < least:
                best, least = (wide, wider), n_bytes
        return best

    def _scratch_bytes(self, n_tokens: int) -> int:
        parts = self.parts
        stride = parts.container.planes["embed"].stride
        return parts.model.chunk_bytes(parts.config, n_tokens, parts.kernels, stride)


def _replanned(opened: Plan, budget: int) -> Plan | None:
    try:
        return replan(opened, budget)
    except BudgetError:
        return None
