"""The byte plan: what the budget is spent on, decided before anything is loaded.

A pure function from sizes to a Ledger.  First what cannot be missed (process, vectors, the least
context, scratch for one token, the smallest read-ahead ring): that sum is the floor, and it does
not depend on the budget, so that a budget of exactly the floor is accepted.  Then, out of what is
left: a longer context, prompts in larger chunks, a deeper ring; then routers, planes that every
token needs whole (attention, head), deciding planes, and the bulk.  A class that does not fit whole
is kept in equal shares by all of its planes: the missing part is then spread over the token, and
reading overlaps with computing.  Where it is known what tokens use of each plane of a class, its
slots follow that use instead: in the simulator a quarter cached so misses a sixth less
(traces/README.md).  Embedding rows come last: a read of one costs a token some 0.1 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .cache.ledger import Ledger
from .cache.shares import shared_out
from .errors import BudgetError
from .units import KIB, MIB, align_up

# One read of the ring: sequential speed is reached from 1 MiB on.  With 2 MiB, which cost the
# interpreter half as much, tokens came at 0.8 of the speed on one device and at 1.07 on another.
STAGE_BYTES = MIB
RING_STAGES = 32  # measured, interleaved: 16 stages 1.51 GB/s, 32 1.75, 48 no clear gain over 32
MIN_RING_STAGES = 4
RESERVED_STAGES = 16  # address space for a ring that a later `replan` may want
LEAST_CONTEXT = 256
LEAST_CHUNK = 1
# What Python, NumPy temporaries and malloc may still grow by after the plan.
GROWTH_BYTES = 6 * MIB
# Logits that a caller asked for, results, small strings.
RESULT_BYTES = 2 * MIB

# Classes of planes in the order in which they are kept; the number is PlaneNeed.rank.
LABELS = {
    -1: "kept: routers",
    0: "kept: attention and head",
    1: "kept: deciding planes",
    2: "kept: FFN",
}
KEPT_ROWS = "kept: embedding rows"  # of planes without a rank
PAGE_TABLES_KEPT = "page tables of kept weights"
RING = "read-ahead ring"
UNUSED = "unused"


@dataclass(frozen=True)
class PlaneNeed:
    """One plane as the plan sees it. `rank`: its class, the least first; None is read by the row,
    and kept in what nothing else has a use for.

    `share`: how much of it one token asks for, where that is known (k of n experts).  `picked`:
    decoding reads single frames of it, so that the ring need not serve what is missing.  `use`: the
    share of its bundles that a token uses, where a trace has told.
    """

    name: str
    n_frames: int
    slot_bytes: int
    rank: int | None
    share: float = 1.0
    picked: bool = False
    use: float | None = None


@dataclass(frozen=True)
class Costs:
    """Bytes as functions of what the plan decides.

    `fixed`: ledger lines that depend on nothing; `context(n)`: state, rotary tables and attention
    scratch for n tokens; `chunk(n)`: buffers of a forward pass over n tokens; `stage`: one stage
    of the read-ahead ring with its decode buffer.
    """

    fixed: dict[str, int]
    context: Callable[[int], int]
    chunk: Callable[[int], int]
    stage: int


@dataclass(frozen=True)
class Plan:
    """The decided numbers: frames kept per plane, ring stages, context, chunk, and the ledger."""

    ledger: Ledger
    resident: dict[str, int]
    ring_stages: int
    stage_bytes: int
    n_context: int
    chunk: int
    streamed_bytes: int  # bytes of frames that a dense pass must still bring in
    file_bytes: int
    needs: tuple[PlaneNeed, ...] = ()
    stage_cost: int = 0  # of one ring stage, with its decode buffer
    keep: bool = True
    most: Mapping[str, int] = field(default_factory=dict)  # frames that any `replan` may keep

    @property
    def lends(self) -> bool:
        """Whether more weights would be kept in what the engine can lend."""
        return self.most != self.resident

    @property
    def bytes_per_token(self) -> int:
        """What a decoded token must bring in: `streamed_bytes`, of routed planes their share."""
        return int(sum(_absent(need, self.resident) * need.share for need in self.needs))


def plan_budget(
    *,
    budget_bytes: int,
    needs: list[PlaneNeed],
    costs: Costs,
    n_context: int,
    context_is_wish: bool,
    chunk: int,
    file_bytes: int,
    keep: bool = True,
) -> Plan:
    """Spend `budget_bytes`.

    `n_context` is taken as it is, or, where it `is_wish`, as the most that would be of use.
    `keep=False` keeps no weight (the naive mode of benchmarks).  Raises BudgetError with the floor.
    """
    wanted = [need for need in needs if need.rank is not None]
    whole = _with_page_tables(sum(need.n_frames * need.slot_bytes for need in wanted))
    least_context = min(n_context, LEAST_CONTEXT) if context_is_wish else n_context
    least_ring = MIN_RING_STAGES * costs.stage
    base = sum(costs.fixed.values()) + costs.context(least_context) + costs.chunk(LEAST_CHUNK)
    base += page_table_bytes(base + least_ring)
    # A model smaller than the ring is kept instead: no budget can be too small to stream it.
    floor = base + (min(least_ring, whole) if keep else least_ring)
    if budget_bytes < floor:
        raise BudgetError(budget_bytes, floor)

    spare = budget_bytes - floor
    if context_is_wish:
        n_context = _most(costs.context, least_context, n_context, spare // 4)
    chunk = _most(costs.chunk, LEAST_CHUNK, chunk, spare // 8)
    longer = costs.context(n_context) - costs.context(least_context)
    larger = costs.chunk(chunk) - costs.chunk(LEAST_CHUNK)
    stages = 0
    missing = base + longer + larger + whole - budget_bytes if keep else whole
    if not keep or missing > 0:
        stages = _ring_stages(spare, missing - _picked_bytes(wanted), costs.stage)
    ledger = Ledger(budget_bytes)
    for name, n_bytes in costs.fixed.items():
        ledger.charge(name, n_bytes)
    ledger.charge("page tables", base - sum(costs.fixed.values())
                  - costs.context(least_context) - costs.chunk(LEAST_CHUNK))
    ledger.charge("state", costs.context(n_context), note=f"{n_context} tokens")
    ledger.charge("scratch", costs.chunk(chunk), note=f"{chunk} tokens at once")
    ledger.charge(RING, stages * costs.stage, note=f"{stages} stages")
    ledger.require()
    resident = _keep(ledger, wanted if keep else [], needs)
    ledger.settle(UNUSED)
    return Plan(
        ledger=ledger,
        resident=resident,
        ring_stages=stages,
        stage_bytes=STAGE_BYTES,
        n_context=n_context,
        chunk=chunk,
        streamed_bytes=_streamed(needs, resident),
        file_bytes=file_bytes,
        needs=tuple(needs),
        stage_cost=costs.stage,
        keep=keep,
        most=resident,
    )


def ring_reserve(plan: Plan) -> int:
    """The most ring stages that any `replan` of this plan has."""
    return max(plan.ring_stages, RESERVED_STAGES)


def replan(opened: Plan, budget_bytes: int) -> Plan:
    """The plan of an open engine for another budget.

    `opened` is the plan it was opened with.  Context, scratch and everything else that is already
    allocated stays; what changes is the ring, which appears when something begins to stream and
    may shrink to its least, and the kept weights, up to `opened.most`.  Raises BudgetError with the
    floor of the open engine.
    """
    lines = _allocated(opened)
    base = sum(lines.values())
    wanted = [need for need in opened.needs if need.rank is not None] if opened.keep else []
    most = sum(opened.most[need.name] * need.slot_bytes for need in wanted)
    whole = _with_page_tables(most)
    least_ring = MIN_RING_STAGES * opened.stage_cost
    never_streams = opened.ring_stages == 0
    floor = base + (min(least_ring, whole) if never_streams else least_ring)
    if budget_bytes < floor:
        raise BudgetError(budget_bytes, floor, "for an engine that is open")
    missing, stages = base + whole - budget_bytes, 0
    if not never_streams or missing > 0:
        missing += _streamed(opened.needs, opened.most) - _picked_bytes(wanted)
        stages = _ring_stages(budget_bytes - floor, missing, opened.stage_cost)
        stages = min(stages, ring_reserve(opened))

    ledger = _charged(budget_bytes, lines)
    ledger.charge(RING, stages * opened.stage_cost, note=f"{stages} stages")
    ledger.require()
    resident = _keep(ledger, wanted, list(opened.needs), opened.most)
    ledger.settle(UNUSED)
    return replace(
        opened, ledger=ledger, resident=resident, ring_stages=stages,
        streamed_bytes=_streamed(opened.needs, resident),
    )  # fmt: skip


def lending(plan: Plan, *lines: str) -> Plan:
    """`plan`, whose engine may lend these lines whole: weights are kept in them meanwhile."""
    lines = _allocated(lent(plan, {name: plan.ledger[name] for name in lines}))
    ledger = _charged(plan.ledger.budget_bytes, lines)
    wanted = [need for need in plan.needs if need.rank is not None] if plan.keep else []
    widest = _keep(ledger, wanted, list(plan.needs))
    # Of some planes the narrow plan keeps more: rows, in what is left of a frame of another.
    most = {name: max(n, plan.resident[name]) for name, n in widest.items()}
    return replace(plan, most=most)


def lent(opened: Plan, spare: Mapping[str, int]) -> Plan:
    """`opened` while these lines lend so many bytes: what `replan` takes for it."""
    lines = {k: n - spare.get(k, 0) for k, n in opened.ledger.lines().items()}
    return replace(opened, ledger=_charged(opened.ledger.budget_bytes, lines))


def needing_more(opened: Plan, name: str, n_bytes: int, *, note: str = "") -> Plan:
    """`opened` as if a line `name` of `n_bytes` had been allocated with it: what `replan` takes
    for an engine that needs more for a while."""
    ledger = _charged(opened.ledger.budget_bytes, opened.ledger.lines())
    ledger.charge(name, n_bytes + page_table_bytes(n_bytes), note=note)
    return replace(opened, ledger=ledger)


def _charged(budget_bytes: int, lines: Mapping[str, int]) -> Ledger:
    ledger = Ledger(budget_bytes)
    for name, n_bytes in lines.items():
        ledger.charge(name, n_bytes)
    return ledger


def _allocated(plan: Plan) -> dict[str, int]:
    """The lines that no `replan` changes."""
    changing = {*LABELS.values(), KEPT_ROWS, PAGE_TABLES_KEPT, RING, UNUSED}
    return {k: n for k, n in plan.ledger.lines().items() if k not in changing}


def _picked_bytes(needs: Sequence[PlaneNeed]) -> int:
    return sum(need.n_frames * need.slot_bytes for need in needs if need.picked)


def _ring_stages(spare: int, missing: int, stage_cost: int) -> int:
    """Every stage is a stage less of kept weights: when little is missing, few serve it."""
    more = min(spare // 6, missing // 6) // stage_cost
    return min(RING_STAGES, MIN_RING_STAGES + max(0, more))


def _streamed(needs: Sequence[PlaneNeed], resident: Mapping[str, int]) -> int:
    return sum(_absent(need, resident) for need in needs)


def _absent(need: PlaneNeed, resident: Mapping[str, int]) -> int:
    return 0 if need.rank is None else (need.n_frames - resident[need.name]) * need.slot_bytes


def _keep(
    ledger: Ledger, wanted: list[PlaneNeed], needs: list[PlaneNeed],
    most: Mapping[str, int] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Grant slots class by class, up to `most` frames of a plane; frames kept per plane."""
    resident = {need.name: 0 for need in needs}
    tables = page_table_bytes(ledger.left_bytes)
    left = max(0, ledger.left_bytes - tables)
    kept_any = 0
    rows = [need for need in needs if need.rank is None] if wanted else []
    for rank, label in {**LABELS, None: KEPT_ROWS}.items():
        members = [need for need in wanted + rows if need.rank == rank]
        whole = sum(need.n_frames * need.slot_bytes for need in members)
        if not whole:
            continue
        if most is not None:
            members = [replace(need, n_frames=most[need.name]) for need in members]
        kept = _serve(members, left, resident)
        left -= kept
        kept_any += kept
        ledger.grant(label, kept, note=f"{100 * kept / whole:.0f} % of {whole:,} B")
    if kept_any:
        ledger.grant(PAGE_TABLES_KEPT, page_table_bytes(kept_any))
    return resident


def _serve(members: list[PlaneNeed], left: int, resident: dict[str, int]) -> int:
    """Keep what fits of one class; returns the bytes spent."""
    whole = [need.n_frames * need.slot_bytes for need in members]
    weights = whole
    if all(need.use is not None for need in members):
        weights = [need.use * size for need, size in zip(members, whole, strict=True)]
    for need, size in zip(members, shared_out(left, weights, whole), strict=True):
        resident[need.name] = int(size) // need.slot_bytes
    spent = sum(resident[need.name] * need.slot_bytes for need in members)
    # Rounding down leaves up to a frame per plane: hand single frames out in plane order.
    for need in members:
        if spent + need.slot_bytes <= left and resident[need.name] < need.n_frames:
            resident[need.name] += 1
            spent += need.slot_bytes
    return spent


def _most(cost: Callable[[int], int], least: int, wish: int, spare: int) -> int:
    """The largest n in [least, wish] whose cost above `least` stays within `spare`."""
    low, high = least, max(least, wish)
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle) - cost(least) <= spare:
            low = middle
        else:
            high = middle - 1
    return low


def page_table_bytes(n_bytes: int) -> int:
    """What the kernel charges to map `n_bytes`: 8 bytes per 4 KiB page, and upper levels."""
    return align_up(n_bytes // 512 + 32 * KIB, 4 * KIB)


def _with_page_tables(n_bytes: int) -> int:
    return n_bytes + page_table_bytes(n_bytes)
