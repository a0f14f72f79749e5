"""A list of prompts: each one's tokens are those it has alone, to the bit, whatever its company."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest

from flashllm import LLM, SamplingParams, assembly
from flashllm.assembly.lending import Lending
from flashllm.engine.group import packed
from flashllm.engine.totals import Totals
from flashllm.errors import BudgetError, UsageError
from flashllm.models.state import StateGroup
from flashllm.planning import needing_more
from flashllm.units import KIB, MIB

from . import forced
from .forced import small_frames
from .tiny import container

BUDGET = "2GiB"
# Prompts that end in different passes, one longer than a chunk, two with the same first tokens.
PROMPTS = [[3, 17, 40], [8, 8, 22, 61, 5, 33, 12], [3, 17, 41, 2], [9] * 9, [50]]
N_TOKENS = 7
VARIANTS = [
    "llama-relu", "qwen3", "gemma2", "opt", "neox", "olmoe-relu", "qwen2-moe", "deepseek",
    "rwkv-4", "rwkv-5.2", "rwkv-6", "rwkv-7",
]  # fmt: skip
WAYS = {
    "resident": {},
    "streamed": {"share": 0.0, "prefill_chunk": 5},
    "half, picked": {"share": 0.5, "mode": "cached"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request, tmp_path_factory):
    return small_frames(tmp_path_factory.mktemp("together"), request.param)


def opened(path, monkeypatch, *, mode: str = "adaptive", **settings) -> LLM:
    """An engine over small stages, with sparse planes in `mode`."""
    return forced.opened(
        path, monkeypatch, store={"mode": mode}, stage_bytes=16 * KIB,
        **{"ram_budget": BUDGET, **settings},
    )  # fmt: skip


def params(k: int) -> SamplingParams:
    """Of prompt k: greedy and drawn in turn, each with a seed of its own."""
    return SamplingParams(
        max_tokens=N_TOKENS, temperature=1.3 * (k % 2), seed=40 + k, ignore_eos=True, logprobs=3
    )


def said(result) -> tuple:
    """What must not depend on company: probabilities too, because leaks may be too small for a
    token to change."""
    return result.tokens, result.text, result.finish_reason, result.logprobs


@pytest.fixture(scope="module")
def alone(model):
    with LLM(str(model), ram_budget=BUDGET) as llm:
        return [said(llm.generate(prompt, params(k))) for k, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("way", WAYS)
def test_together_is_as_alone(model, alone, monkeypatch, way):
    with opened(model, monkeypatch, **WAYS[way]) as llm:
        results = llm.generate(PROMPTS, [params(k) for k in range(len(PROMPTS))])
        assert [said(result) for result in results] == alone
        assert [r.flash["sequences"] for r in results] == [5] * 5
        assert results[0].timings["group_predicted_n"] == 5 * (N_TOKENS - 1)
        again = llm.generate(PROMPTS[2], params(2))
    assert said(again) == alone[2], "a group leaves nothing behind"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return container(tmp_path_factory.mktemp("small"), "llama-relu")


def test_company_changes_nothing(small):
    with LLM(str(small), ram_budget=BUDGET, debug=True) as llm:
        settings = dict(max_tokens=9, temperature=0, ignore_eos=True, logprobs=4)
        first, *_ = llm.generate([[4, 5, 6], [1, 2, 3, 4, 5], [60]], **settings)
        other, *_ = llm.generate([[4, 5, 6], [33] * 20], **settings)
    assert said(first) == said(other)


def test_sequences_end_one_by_one(small):
    with LLM(str(small), ram_budget=BUDGET, debug=True) as llm:
        free = [llm.generate(p, params(k)).tokens for k, p in enumerate(PROMPTS[:4])]
        ends = [{"max_tokens": 7}, {"max_tokens": 3},
                {"stop_token_ids": (free[2][0],)}, {"stop_token_ids": (free[3][4],)}]  # fmt: skip
        asked = [dataclasses.replace(params(k), **end) for k, end in enumerate(ends)]
        each = [llm.generate(p, one) for p, one in zip(PROMPTS, asked, strict=False)]
        together = llm.generate(PROMPTS[:4], asked)
        assert list(map(said, together)) == list(map(said, each))
        assert {r.finish_reason for r in together} == {"stop", "length"}
        n_steps = max(len(r.tokens) for r in together)
        assert together[0].timings["group_predicted_n"] < 4 * n_steps
        text = llm.generate(["abc", "hello"], stop=["a", "e"], seed=1, temperature=1.0)
        assert text[1].text == llm.generate("hello", stop=["a", "e"], seed=1, temperature=1.0).text


def test_one_pass_over_the_weights_serves_all(small, monkeypatch):
    with opened(small, monkeypatch, share=0.0, mode="sweep") as llm:
        one = llm.generate(PROMPTS[0], params(0)).flash
        all_five = llm.generate(PROMPTS, params(0))[0].flash
    assert all_five["decode_bytes_read"] == one["decode_bytes_read"] > 0


def test_the_last_prompt_leaves_its_state(small):
    with LLM(str(small), ram_budget=BUDGET) as llm:
        settings = dict(max_tokens=5, temperature=0, ignore_eos=True)
        *_, last = llm.generate(PROMPTS, **settings)
        state = llm.save_state()
        on = llm.generate([[7], [8, 9]], state=state, **settings)
        whole = [llm.generate(PROMPTS[-1] + last.tokens + m, **settings) for m in ([7], [8, 9])]
    assert [r.tokens for r in on] == [r.tokens for r in whole]


def floor_of(path, monkeypatch, **settings) -> int:
    """The least budget, of a process that is always of one size."""
    monkeypatch.setattr(assembly.opening, "interpreter_bytes", lambda: 32 * MIB)
    with pytest.raises(BudgetError) as refusal:
        LLM(str(path), ram_budget=1, **settings)
    return refusal.value.floor_bytes


def test_states_are_in_the_ledger_while_they_live(tmp_path, monkeypatch):
    """As many sequences as the budget has room for; kept weights give way, and come back."""
    path = container(tmp_path, "qwen3", tokenizer=False)
    ledgers = []
    floor = floor_of(path, monkeypatch, n_context=16)
    with LLM(str(path), ram_budget=floor + MIB, n_context=16) as llm:
        llm._progress = lambda *_: ledgers.append(llm.plan.ledger.lines())
        resident = llm.plan.resident
        each = llm.model.state_bytes(llm.config, 16, llm._kv_dtype)
        results = llm.generate([[k % 60] for k in range(70)], max_tokens=40, temperature=0)
        for result in results:
            assert result.flash["sequences_limit"] in (None, "ram_budget", "prefill_chunk")
        held = [lines.get("states of a list of prompts", 0) for lines in ledgers]
        assert max(held) >= each * (results[0].flash["sequences"] - 1)
        assert all(sum(lines.values()) == floor + MIB for lines in ledgers)
        assert llm.plan.resident == resident
        assert "states of a list of prompts" not in llm.plan.ledger.lines()


def test_what_stands_against_more_is_said(small, monkeypatch):
    with LLM(str(small), ram_budget=BUDGET, prefill_chunk=2) as llm:
        results = llm.generate(PROMPTS, max_tokens=2)
        assert [r.flash["sequences"] for r in results] == [2, 2, 2, 2, 1]
        assert results[0].flash["sequences_limit"] == "prefill_chunk"
        with_states = Lending.with_states
        monkeypatch.setattr(Lending, "with_states", lambda self, opened, some: needing_more(
            with_states(self, opened, some), "more than there is", 2**40
        ))  # fmt: skip
        results = llm.generate(PROMPTS[:2], max_tokens=2)
        assert [r.flash["sequences"] for r in results] == [1, 1]
        assert results[0].flash["sequences_limit"] == "ram_budget"
        with pytest.raises(UsageError, match="2 params for 3 prompts"):
            llm.generate(PROMPTS[:3], [params(0), params(1)])


def test_a_list_is_cancelled_as_a_whole(small):
    with LLM(str(small), ram_budget=BUDGET, prefill_chunk=3) as llm:
        settings = dict(max_tokens=20, ignore_eos=True)
        taken = []
        step = llm._engine.step

        def counting(*args, **kwargs):
            step(*args, **kwargs)
            taken.append(kwargs.get("decoding"))
            if taken.count(True) == 3:
                llm.cancel()

        llm._engine.step = counting
        results = llm.generate(PROMPTS, **settings)
    assert [r.finish_reason for r in results] == ["cancelled"] * 5
    assert [len(r.tokens) for r in results] == [4, 4, 4, 0, 0]


@pytest.mark.parametrize("room", [1, 2, 3, 5, 64])
def test_packing_covers_every_prompt_in_order(room):
    lengths = [3, 1, 7, 2, 2, 9]
    passes = packed(lengths, room)
    assert all(1 <= sum(b - a for _, a, b, _ in parts) <= room for parts in passes)
    seen = [[] for _ in lengths]
    for k, start, stop, ends in (part for parts in passes for part in parts):
        assert ends == (stop == lengths[k])
        seen[k] += range(start, stop)
    assert seen == [list(range(n)) for n in lengths]
    assert len(passes) == -(-sum(lengths) // room)
    assert np.all(np.diff([k for parts in passes for k, *_ in parts]) >= 0)


@pytest.mark.parametrize("variant", ["llama-relu", "llama-mha", "gemma2"])
def test_a_pass_works_in_its_scratch(tmp_path, variant):
    """NumPy allocates less in a pass of many tokens than one buffer of it: the ledger has scratch,
    and a few MiB for all else."""
    path = container(tmp_path, variant, tokenizer=False)
    with LLM(str(path), ram_budget=BUDGET, prefill_chunk=720) as llm:
        ids = np.arange(60, dtype=np.int32) % 50
        llm.logits(ids)  # first calls make tables
        many = StateGroup([(llm.model.new_state(60, np.float32), 60) for _ in range(12)])
        tracemalloc.start()
        llm._engine.step(np.tile(ids, 12), None, Totals(), state=many, head=False)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        smallest = 4 * 720 * llm.config.hidden_size
    assert peak < smallest, variant
