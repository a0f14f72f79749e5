"""The byte plan: what the budget is spent on, decided before anything is loaded.

A pure function from sizes to a Ledger.  Order of claims: what cannot be missed (process, vectors,
state, scratch, read-ahead ring), then planes that every token needs whole (attention, head), then
deciding planes, then the bulk.  A class that does not fit whole is kept in equal shares by all of
its planes, so that the missing part is spread over the token and reading overlaps with computing.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cache.ledger import Ledger
from .errors import BudgetError
from .units import KIB, MIB, align_up

STAGE_BYTES = MIB  # one read of the ring: sequential speed is reached from 1 MiB on
RING_STAGES = 16  # as many in flight as the device wants (measured: 16 to 64)
MIN_RING_STAGES = 4
# What Python, NumPy temporaries and malloc may still grow by after the plan: measured 2.5 to 4 MiB
# over 1,000 tokens on the bundled model.
GROWTH_BYTES = 6 * MIB
# Logits that a caller asked for, results and small strings.
RESULT_BYTES = 2 * MIB
THREAD_BYTES = 144 * KIB  # a reader thread's touched stack and its kernel stack


@dataclass(frozen=True)
class PlaneNeed:
    """One plane as the plan sees it. `rank` is its class: 0 is served first; None is never kept."""

    name: str
    n_frames: int
    slot_bytes: int
    rank: int | None


@dataclass(frozen=True)
class Plan:
    """The decided numbers: frames kept per plane, ring stages, context, chunk, and the ledger."""

    ledger: Ledger
    resident: dict[str, int]
    ring_stages: int
    stage_bytes: int
    n_context: int
    chunk: int
    streamed_bytes: int  # bytes of frames a dense pass must still bring in
    file_bytes: int


def plan_budget(
    *,
    budget_bytes: int,
    needs: list[PlaneNeed],
    fixed: dict[str, int],
    state_bytes: int,
    rope_bytes: int,
    scratch_bytes: int,
    stage_cost: int,
    n_context: int,
    chunk: int,
    file_bytes: int,
    keep: bool = True,
) -> Plan:
    """Spend `budget_bytes`.

    `fixed` are the lines that do not depend on the plan; `stage_cost` is what one ring stage
    costs, decode buffers included; `keep=False` keeps nothing (the naive mode of benchmarks).
    Raises BudgetError with the floor when even `MIN_RING_STAGES` do not fit.
    """
    lines = dict(fixed)
    lines["state (KV cache)"] = state_bytes
    lines["rotary tables"] = rope_bytes
    lines["scratch"] = scratch_bytes
    base = sum(lines.values())
    wanted = [need for need in needs if need.rank is not None]
    all_bytes = sum(need.n_frames * need.slot_bytes for need in wanted)
    overhead = page_table_bytes(budget_bytes)
    lines["kernel's page tables"] = overhead
    left = budget_bytes - base - overhead
    stages = 0
    if all_bytes > left or not keep:
        stages = min(RING_STAGES, max(MIN_RING_STAGES, left // (8 * stage_cost)))
        # At the floor a ring of the minimum must fit; with more room it may take an eighth.
        left -= stages * stage_cost
        if left < 0:
            floor = base + MIN_RING_STAGES * stage_cost
            raise BudgetError(budget_bytes, floor + page_table_bytes(floor) + KIB)
    lines["read-ahead ring"] = stages * stage_cost
    resident = {need.name: 0 for need in needs}
    for rank in sorted({need.rank for need in wanted}) if keep else ():
        left -= _serve(rank, wanted, left, resident)
    kept = {need.name: resident[need.name] * need.slot_bytes for need in needs}
    for rank, label in ((0, "kept: attention and head"), (1, "kept: deciding planes"),
                        (2, "kept: FFN bundles")):
        lines[label] = sum(kept[need.name] for need in wanted if need.rank == rank)
    lines["unused"] = budget_bytes - sum(lines.values())
    ledger = Ledger(budget_bytes, lines)
    ledger.check()
    missing = sum((n.n_frames - resident[n.name]) * n.slot_bytes for n in wanted)
    return Plan(
        ledger=ledger,
        resident=resident,
        ring_stages=stages,
        stage_bytes=STAGE_BYTES,
        n_context=n_context,
        chunk=chunk,
        streamed_bytes=missing,
        file_bytes=file_bytes,
    )


def _serve(rank: int, wanted: list[PlaneNeed], left: int, resident: dict[str, int]) -> int:
    """Keep what fits of one class; returns the bytes spent."""
    members = [need for need in wanted if need.rank == rank]
    whole = sum(need.n_frames * need.slot_bytes for need in members)
    share = 1.0 if whole <= left else max(0, left) / whole
    for need in members:
        resident[need.name] = int(need.n_frames * share)
    spent = sum(resident[need.name] * need.slot_bytes for need in members)
    # Rounding down leaves up to a frame per plane: hand single frames out in plane order.
    for need in members:
        fits = spent + need.slot_bytes <= left
        if fits and resident[need.name] < need.n_frames:
            resident[need.name] += 1
            spent += need.slot_bytes
    return spent


def page_table_bytes(n_bytes: int) -> int:
    """What the kernel charges for mapping `n_bytes`: 8 bytes per 4 KiB page, and the upper levels."""
    return align_up(n_bytes // 512 + 64 * KIB, 4 * KIB)


def fits_context(*, wanted: int, per_token: int, budget_bytes: int, least: int = 256) -> int:
    """A context whose state takes at most a quarter of the budget, unless that is below `least`."""
    return max(min(wanted, least), min(wanted, budget_bytes // 4 // max(per_token, 1)))
