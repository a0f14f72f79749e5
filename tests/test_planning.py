"""The byte plan: sums to the budget, refuses below the floor, accepts the floor itself."""

from __future__ import annotations

import dataclasses

import pytest

from flashllm.cache.shares import shared_out
from flashllm.errors import BudgetError
from flashllm.planning import (
    LABELS,
    MIN_RING_STAGES,
    Costs,
    PlaneNeed,
    plan_budget,
    replan,
)
from flashllm.units import MIB

COSTS = Costs(
    fixed={"interpreter": 40 * MIB, "vectors": 100_000},
    context=lambda n: n * 20_000,
    chunk=lambda n: n * 300_000,
    stage=2 * MIB,
)
NEEDS = [
    PlaneNeed("embed", 50, 65536, None),
    *(PlaneNeed(f"layers.{i}.qkv", 7, 262144, 0) for i in range(8)),
    *(PlaneNeed(f"layers.{i}.deciding", 30, 262144, 1) for i in range(8)),
    *(PlaneNeed(f"layers.{i}.ffn", 900, 20480, 2) for i in range(8)),
]


def plan(budget, **changes):
    arguments = dict(
        budget_bytes=budget,
        needs=NEEDS,
        costs=COSTS,
        n_context=2048,
        context_is_wish=True,
        chunk=64,
        file_bytes=10**9,
    )
    return plan_budget(**{**arguments, **changes})


def floor_of(**changes) -> int:
    with pytest.raises(BudgetError) as caught:
        plan(MIB, **changes)
    return caught.value.floor_bytes


@pytest.mark.parametrize("extra", [0, 1, 4096, MIB, 10 * MIB, 100 * MIB, 1000 * MIB])
def test_lines_sum_to_the_budget_and_kept_frames_match_them(extra):
    budget = floor_of() + extra
    made = plan(budget)
    made.ledger.check()
    for rank, label in LABELS.items():
        kept = sum(made.resident[n.name] * n.slot_bytes for n in NEEDS if n.rank == rank)
        assert made.ledger.lines().get(label, 0) == kept
    assert all(made.resident[n.name] <= n.n_frames for n in NEEDS)


def test_the_floor_itself_is_accepted_and_one_byte_less_is_not():
    floor = floor_of()
    assert plan(floor).ring_stages == MIN_RING_STAGES
    with pytest.raises(BudgetError) as caught:
        plan(floor - 1)
    assert caught.value.floor_bytes == floor


def test_a_stated_context_is_part_of_the_floor():
    assert floor_of(context_is_wish=False) > floor_of()
    assert plan(floor_of(context_is_wish=False), context_is_wish=False).n_context == 2048


def test_with_everything_kept_there_is_no_ring_and_nothing_streams():
    made = plan(2000 * MIB)
    assert made.ring_stages == 0 and made.streamed_bytes == 0
    assert made.n_context == 2048 and made.chunk == 64


def test_embedding_rows_are_kept_in_what_nothing_else_wants():
    whole = plan(2000 * MIB)
    rows = [n for n in NEEDS if n.rank is None]
    assert rows and all(whole.resident[n.name] == n.n_frames for n in rows)
    bulk = sum(whole.ledger.lines()[label] for label in LABELS.values()
               if label in whole.ledger.lines())  # fmt: skip
    for tight in (plan(floor_of() + bulk // 2), replan(whole, floor_of() + bulk // 2)):
        assert tight.streamed_bytes > 0 and not any(tight.resident[n.name] for n in rows)
    assert replan(whole, 2000 * MIB).resident == whole.resident


def test_classes_are_served_in_order_and_evenly():
    made = plan(floor_of() + 80 * MIB)
    lines = made.ledger.lines()
    assert lines[LABELS[0]] == sum(n.n_frames * n.slot_bytes for n in NEEDS if n.rank == 0)
    deciding = [made.resident[n.name] for n in NEEDS if n.rank == 1]
    assert min(deciding) > 0 and max(deciding) - min(deciding) <= 1
    more = plan(floor_of() + 120 * MIB)
    assert more.streamed_bytes < made.streamed_bytes


def test_slots_follow_what_tokens_use_where_that_is_known():
    uses = [0.2, 0.02, *[0.1] * (sum(n.rank == 2 for n in NEEDS) - 2)]
    known = iter(uses)
    needs = [dataclasses.replace(n, use=next(known) if n.rank == 2 else None) for n in NEEDS]
    whole = sum(n.n_frames * n.slot_bytes for n in NEEDS if n.rank != 2 and n.rank is not None)
    budget = floor_of() + whole + 40 * MIB
    one, other = plan(budget), plan(budget, needs=needs)
    bulk = [n for n in needs if n.rank == 2]
    kept = [other.resident[n.name] for n in bulk]
    assert 0 < sum(kept) < sum(n.n_frames for n in bulk)
    spent = [sum(p.resident[n.name] * n.slot_bytes for n in bulk) for p in (one, other)]
    assert spent[1] == pytest.approx(spent[0], abs=len(bulk) * bulk[0].slot_bytes)
    assert kept[0] < bulk[0].n_frames and kept[0] == pytest.approx(2 * kept[2], abs=4)
    assert kept[2] == pytest.approx(5 * kept[1], abs=6)
    # one plane of which nothing is known, and all are served alike again
    needs[-1] = dataclasses.replace(needs[-1], use=None)
    assert plan(budget, needs=needs).resident == one.resident


@pytest.mark.parametrize("amount, weights, most, expected", [
    (10, [1, 1], [10, 10], [5, 5]), (10, [3, 1], [10, 10], [7.5, 2.5]),
    (10, [3, 1], [4, 10], [4, 6]), (30, [3, 1], [10, 10], [10, 10]),
    (10, [1, 0], [4, 10], [4, 6]), (0, [1, 1], [4, 4], [0, 0]), (5, [0, 0], [10, 10], [2.5, 2.5]),
])  # fmt: skip
def test_shares(amount, weights, most, expected):
    assert shared_out(amount, weights, most) == pytest.approx(expected)


def test_a_token_brings_in_the_share_that_is_routed_to_it():
    experts = [PlaneNeed(f"layers.{i}.experts", 900, 20480, 2, 0.25) for i in range(8)]
    routed = plan(floor_of() + 80 * MIB, needs=NEEDS[:9] + experts)
    every = plan(floor_of() + 80 * MIB, needs=NEEDS[:9] + NEEDS[17:])
    assert routed.resident == {n.name.replace("ffn", "experts"): every.resident[n.name]
                               for n in every.needs}  # fmt: skip
    absent = sum((n.n_frames - routed.resident[n.name]) * n.slot_bytes for n in experts)
    assert absent and routed.streamed_bytes == every.streamed_bytes == every.bytes_per_token
    assert routed.bytes_per_token == every.bytes_per_token - absent * 3 // 4


def test_a_ring_serves_what_is_streamed_and_not_what_is_picked():
    """The same needs, the last class picked: fewer stages, and the more is kept."""
    picked = [dataclasses.replace(need, picked=need.rank == 2) for need in NEEDS]
    budget = floor_of() + 60 * MIB
    one, other = plan(budget), plan(budget, needs=picked)
    assert MIN_RING_STAGES <= other.ring_stages < one.ring_stages
    assert sum(other.resident.values()) > sum(one.resident.values())


def test_nothing_is_kept_in_naive_mode():
    made = plan(2000 * MIB, keep=False)
    assert not any(made.resident.values()) and made.ring_stages >= MIN_RING_STAGES


@pytest.mark.parametrize("variant", ["llama-relu", "llama-mha", "opt-plain"])
def test_what_is_allocated_is_what_was_counted(tmp_path, variant):
    """Small lines hide inside the interpreter's growth: the kernel's numbers cannot see them."""
    from flashllm import LLM
    from flashllm.models.scratch import Scratch

    from . import tiny

    with LLM(str(tiny.container(tmp_path, variant)), ram_budget="2GiB") as llm:
        widths = llm.model.scratch_widths(llm.config)
        assert Scratch.bytes_needed(widths, llm.plan.chunk) == llm.model.scratch.n_bytes
        held = sum(a.nbytes for a in (*llm._engine.state.keys, *llm._engine.state.values))
        assert held <= llm.plan.ledger["state"]
