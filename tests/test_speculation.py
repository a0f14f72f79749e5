"""Drafts from the text: tokens, probabilities and state are those of plain decoding, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from flashllm import LLM
from flashllm.engine.drafts import LONGEST_REST, REST, TRIAL, Drafts, Pace
from flashllm.engine.lookup import Lookup
from flashllm.errors import UsageError

from .forced import small_frames
from .test_together import BUDGET, WAYS, opened, said
from .tiny import container

# Text that repeats itself, and in the end does not: drafts are right, half right and wrong.
PROMPT = [3, 17, 40, 8, 3, 17, 40, 9, 3, 17, 40, 8, 22, 3, 17]
VARIANTS = ["llama-relu", "qwen3", "mistral-window", "opt", "olmoe-relu", "deepseek", "rwkv-4",
            "rwkv-5.2", "rwkv-6", "rwkv-7"]  # fmt: skip
SETTINGS = {
    "greedy": dict(temperature=0.0, max_tokens=24),
    "drawn": dict(temperature=0.7, seed=5, top_p=0.9, repetition_penalty=1.1, max_tokens=17),
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request, tmp_path_factory):
    return small_frames(tmp_path_factory.mktemp("speculation"), request.param)


def guess(monkeypatch, drafts):
    """Drafts come from `drafts(ids so far, n)`: the text of a tiny model repeats nothing."""
    monkeypatch.setattr(Lookup, "draft", lambda self, n: drafts(self._ids[: self._n].tolist(), n))


def told(truth: list[int], wrong_every: int):
    """A drafter that knows the tokens, and errs at every so manieth."""

    def draft(ids, n):
        at = len(ids)
        some = truth[at : at + n]
        return [t if (at + k) % wrong_every else (t + 1) % 60 for k, t in enumerate(some)]

    return draft


@pytest.fixture(scope="module")
def plain(model):
    """Name -> (result, the state left behind)."""
    with LLM(str(model), ram_budget=BUDGET) as llm:
        found = {}
        for name, settings in SETTINGS.items():
            result = llm.generate(PROMPT, ignore_eos=True, logprobs=3, **settings)
            found[name] = result, llm.save_state()
        return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SETTINGS)
def test_drafts_change_nothing(model, plain, monkeypatch, name, way):
    expected, left = plain[name]
    guess(monkeypatch, told(PROMPT + expected.tokens, wrong_every=7))
    with opened(model, monkeypatch, speculate=4, **WAYS[way]) as llm:
        result = llm.generate(PROMPT, ignore_eos=True, logprobs=3, **SETTINGS[name])
        state = llm.save_state()
    assert said(result) == said(expected)
    assert 0 < result.timings["draft_n_accepted"] < result.timings["draft_n"]
    assert result.flash["accepted"] == result.timings["draft_n_accepted"]
    assert (state.length, state.pending) == (left.length, left.pending)
    for array, wanted in zip(state.arrays.values(), left.arrays.values(), strict=True):
        np.testing.assert_array_equal(array, wanted)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return container(tmp_path_factory.mktemp("small"), "llama-relu")


@pytest.mark.parametrize("speculate", ["off", "auto", 1, "8"])
def test_real_drafts_change_nothing_either(small, speculate):
    """A text that falls into a loop, as small greedy models do: lookup finds its turns."""
    settings = dict(max_tokens=80, temperature=0.0, ignore_eos=True)
    with LLM(str(small), ram_budget=BUDGET) as llm:
        expected = llm.generate(PROMPT * 3, **settings).tokens
    with LLM(str(small), ram_budget=BUDGET, speculate=speculate, debug=True) as llm:
        assert ("drafts" in llm.plan.ledger.lines()) == (speculate != "off")
        result = llm.generate(PROMPT * 3, **settings)
        streamed = [t for delta in llm.stream(PROMPT * 3, **settings) for t in delta.tokens]
    assert result.tokens == streamed == expected
    assert result.flash["speculate"] == str(speculate)
    assert (result.flash["drafted"] > 0) == (speculate in (1, "8")) or speculate == "auto"


def test_a_pass_with_right_drafts_is_one_pass(small, monkeypatch):
    settings = dict(max_tokens=21, temperature=0.0, ignore_eos=True)
    with opened(small, monkeypatch, share=0.0, mode="sweep") as llm:
        expected = llm.generate(PROMPT, **settings)
    guess(monkeypatch, told(PROMPT + expected.tokens, wrong_every=1000))
    with opened(small, monkeypatch, share=0.0, mode="sweep", speculate=4) as llm:
        result = llm.generate(PROMPT, **settings)
    assert result.tokens == expected.tokens
    assert result.flash["decode_bytes_read"] * 5 == expected.flash["decode_bytes_read"]
    assert result.flash["bytes_per_token"] * 5 == expected.flash["bytes_per_token"]


def test_it_ends_where_plain_decoding_ends(small, monkeypatch):
    with LLM(str(small), ram_budget=BUDGET) as llm:
        free = llm.generate(PROMPT, max_tokens=30, temperature=0.0, ignore_eos=True)
        stop = free.tokens[9]
        n_room = llm.n_context - 5
        full = llm.generate([7] * n_room, temperature=0.0, ignore_eos=True)
        expected = llm.generate(PROMPT, temperature=0.0, stop_token_ids=[stop])
    guess(monkeypatch, told(PROMPT + free.tokens, wrong_every=1000))
    with LLM(str(small), ram_budget=BUDGET, speculate=6) as llm:
        result = llm.generate(PROMPT, temperature=0.0, stop_token_ids=[stop])
        assert said(result) == said(expected)
        state = llm.save_state()
        assert state.length == len(PROMPT) + len(result.tokens)
        on = llm.generate([4, 4], max_tokens=5, temperature=0.0, state=state).tokens
        whole = PROMPT + result.tokens + list(state.pending) + [4, 4]
        assert on == llm.generate(whole, max_tokens=5, temperature=0.0).tokens
        monkeypatch.undo()
        assert said(llm.generate([7] * n_room, temperature=0.0, ignore_eos=True)) == said(full)


@pytest.mark.parametrize("asked", ["of", 0, -1, 65, True, 1.5, "1000"])
def test_what_is_no_number_of_tokens(small, asked):
    with pytest.raises(UsageError, match="speculate"):
        LLM(str(small), ram_budget=BUDGET, speculate=asked)


def test_approximate_decoding_is_not_verified(small):
    with pytest.raises(UsageError, match="approx"):
        LLM(str(small), ram_budget=BUDGET, speculate="auto", mode="approx")


@pytest.mark.parametrize(
    "ids, n, draft",
    [
        ([1, 2, 3, 4, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 4, 1, 2], 5, [3, 4, 1, 2, 3]),  # and on from what was drafted
        ([1, 2, 3, 9, 1, 2, 5, 9, 1, 2], 1, [5]),  # the latest
        ([7, 1, 2, 3, 8, 1, 2, 5, 7, 1, 2], 1, [3]),  # the longest
        ([4, 4, 4], 3, [4, 4, 4]),
        ([1, 2, 3, 4], 3, []),
        ([5, 1, 6, 1], 3, []),  # one token is no match
        ([1], 3, []),
    ],
)  # fmt: skip
def test_lookup(ids, n, draft):
    lookup = Lookup(np.array(ids[:1], np.int32), 20)
    for token in ids[1:]:
        lookup.push(token)
    assert lookup.draft(n) == draft


def paced(cost_of_a_draft: float, share_right: float, n_tokens: int = 2000) -> tuple[Pace, float]:
    """A run in which a pass of k drafts takes 1 + k * cost and each is right with that chance."""
    rng = np.random.default_rng(0)
    pace, spent, n = Pace(8), 0.0, 0
    while n < n_tokens:
        k = pace.wanted()
        if not k:
            pace.plain(1_000_000)
            spent, n = spent + 1, n + 1
            continue
        wrong = np.flatnonzero(rng.random(k) >= share_right)
        right = int(wrong[0]) if wrong.size else k
        took = 1 + k * cost_of_a_draft
        pace.verified(int(1e6 * took), drafted=k, accepted=right)
        spent, n = spent + took, n + 1 + right
    return pace, spent / n


def test_drafting_goes_on_where_it_pays():
    pace, per_token = paced(cost_of_a_draft=0.05, share_right=0.8)
    assert pace.n_losses == 0 and per_token < 0.42


@pytest.mark.parametrize("cost, right", [(0.5, 0.2), (1.0, 0.5), (0.05, 0.0)])
def test_drafting_stops_where_it_loses(cost, right):
    pace, per_token = paced(cost, right)
    assert pace.n_losses > 2 and pace.next_rest == LONGEST_REST
    assert per_token < 1.06, "trials cost more than a twentieth"


def test_a_loss_is_not_for_ever():
    pace = Pace(8)
    for _ in range(TRIAL):
        assert pace.wanted() == 0
        pace.plain(100)
    for _ in range(TRIAL):
        assert pace.wanted() > 0
        pace.verified(150, drafted=4, accepted=0)
    assert pace.wanted() == 0 and pace.rest == REST
    for _ in range(REST):
        pace.plain(100)
    assert pace.wanted() > 0


def test_a_number_is_kept_to():
    pace = Pace(3, always=True)
    for _ in range(10):
        assert pace.wanted() == 3
        pace.verified(10**9, drafted=3, accepted=0)
    assert [str(Drafts.of(asked)) for asked in ("auto", "off", 3)] == ["auto", "off", "3"]
