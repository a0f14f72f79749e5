"""The Python API: results, streams, reproducibility, errors, lifetime."""

from __future__ import annotations

import os
import shutil
import threading

import numpy as np
import pytest

from flashllm import LLM, SamplingParams, assembly
from flashllm.errors import (
    BudgetError,
    BusyError,
    ClosedError,
    ContextLengthError,
    FlashReadError,
    TokenizerError,
    UnknownNameError,
    UsageError,
)

from . import tiny

BUDGET = "2GiB"  # the budget is the whole process, and this one runs all the tests


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.container(tmp_path_factory.mktemp("api")))


@pytest.fixture
def llm(model):
    with LLM(model, ram_budget=BUDGET, debug=True) as opened:
        yield opened


def test_result_has_the_promised_shape(llm):
    result = llm.generate("abc", max_tokens=5, seed=4, ignore_eos=True)
    assert len(result.tokens) == 5 and result.finish_reason == "length" and result.seed == 4
    assert result.text == llm.decode(result.tokens)
    assert result.usage["prompt_tokens"] == 4 and result.usage["completion_tokens"] == 5  # BOS
    assert result.usage["total_tokens"] == 9
    wanted = {"prompt_n", "prompt_ms", "prompt_per_second", "predicted_n", "predicted_ms",
              "predicted_per_second", "load_ms", "ttft_ms"}  # fmt: skip
    assert wanted <= result.timings.keys()
    wanted = {"bytes_read", "reads", "bytes_useful", "hits", "misses", "hit_rate", "stall_ms",
              "decompress_ms", "peak_anon", "peak_mapped", "peak_cgroup", "ram_budget",
              "truncated_prompt_tokens", "predicted_rows", "wasted_rows"}  # fmt: skip
    assert wanted <= result.flash.keys()


def test_text_and_ids_are_the_same_prompt(llm):
    ids = llm.encode("abc")
    assert ids[0] == 0, "the tokenizer's BOS comes first"
    by_text = llm.generate("abc", max_tokens=8, temperature=0)
    assert by_text.tokens == llm.generate(ids, max_tokens=8, temperature=0).tokens
    assert by_text.tokens == llm.generate(np.array(ids), max_tokens=8, temperature=0).tokens


def test_a_list_of_prompts_gives_a_list_of_results(llm):
    results = llm.generate(["ab", "cd"], max_tokens=3, temperature=0)
    assert [r.tokens for r in results] == [
        llm.generate(p, max_tokens=3, temperature=0).tokens for p in ("ab", "cd")
    ]
    assert len(llm.generate([[1, 2], [3]], max_tokens=2)) == 2


@pytest.mark.parametrize("seed", range(6))
def test_stream_concatenates_to_the_whole_text(llm, seed):
    settings = dict(max_tokens=60, temperature=1.5, seed=seed, ignore_eos=True)
    whole = llm.generate("a", **settings)
    deltas = list(llm.stream("a", **settings))
    assert "".join(deltas) == whole.text
    assert [t for d in deltas for t in d.tokens] == whole.tokens
    assert deltas[-1].finish_reason == "length" and deltas[-1].result.tokens == whole.tokens


def test_stop_strings_and_stop_ids(llm):
    free = llm.generate("a", max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    stop = free.text[5:8]
    cut = llm.generate("a", max_tokens=40, temperature=1.0, seed=3, ignore_eos=True, stop=[stop])
    assert cut.finish_reason == "stop" and cut.text == free.text[: free.text.find(stop)]
    assert "".join(
        llm.stream("a", max_tokens=40, temperature=1.0, seed=3, ignore_eos=True, stop=stop)
    ) == cut.text
    by_id = llm.generate("a", max_tokens=40, temperature=1.0, seed=3, ignore_eos=True,
                         stop_token_ids=[free.tokens[4]])  # fmt: skip
    first = free.tokens.index(free.tokens[4])
    assert by_id.tokens == free.tokens[:first] and by_id.finish_reason == "stop"


def test_same_seed_same_text_whatever_came_before(llm):
    first = llm.generate("abc", max_tokens=20, temperature=1.0, seed=9).tokens
    llm.generate("zzz", max_tokens=7, temperature=1.0, seed=1)
    assert llm.generate("abc", max_tokens=20, temperature=1.0, seed=9).tokens == first


def test_logits_rows_and_logprobs_agree(llm):
    result = llm.generate([1, 2, 3], max_tokens=3, temperature=0, logprobs=2, ignore_eos=True)
    rows = llm.logits([1, 2, 3, *result.tokens[:2]])[2:].astype(np.float64)
    expected = rows - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True))
    expected -= rows.max(1, keepdims=True)
    for step, row in zip(result.logprobs, expected, strict=True):
        assert step["logprob"] == pytest.approx(row[step["token"]], abs=1e-6)
        assert len(step["top_logprobs"]) == 2


@pytest.mark.parametrize(
    "prompt, error",
    [([], UsageError), ([64], UsageError), ([-1], UsageError), ([1.5], UsageError),
     (None, UsageError), ([[]], UsageError)],
)  # fmt: skip
def test_bad_prompts(llm, prompt, error):
    with pytest.raises(error):
        llm.generate(prompt)


def test_an_overlong_prompt_names_both_numbers(llm):
    with pytest.raises(ContextLengthError, match=rf"{llm.n_context + 1}.*{llm.n_context}"):
        llm.generate([1] * llm.n_context)
    with pytest.raises(ContextLengthError):
        llm.logits([1] * (llm.n_context + 1))
    filled = llm.generate([1] * (llm.n_context - 2), max_tokens=50, ignore_eos=True)
    assert len(filled.tokens) == 2 and filled.finish_reason == "length"


def test_unknown_arguments_name_the_nearest(llm):
    with pytest.raises(UsageError, match="temperature"):
        llm.generate("a", temprature=1.0)


def test_text_without_a_tokenizer(tmp_path):
    path = tiny.container(tmp_path, tokenizer=False)
    with LLM(str(path), ram_budget=BUDGET) as llm:
        result = llm.generate([1, 2], max_tokens=3)
        assert result.text is None and len(result.tokens) == 3
        with pytest.raises(TokenizerError, match=str(path)):
            llm.generate("abc")


def test_budgets(model):
    with pytest.raises(BudgetError, match="floor") as caught:
        LLM(model, ram_budget="1MiB")
    assert caught.value.floor_bytes > 2**20 and caught.value.exit_code == 4
    for wrong in ("lots", "0", -5, 1.5):
        with pytest.raises(UsageError):
            LLM(model, ram_budget=wrong)


def test_a_result_that_breaks_the_budget_is_refused(model):
    with LLM(model, ram_budget=BUDGET) as llm:
        llm.plan.ledger.budget_bytes = 1  # stands for a budget that is used up
        llm.plan.ledger._lines["unused"] = 0
        # 16,384 rows of 64 logits would be 4 MiB; the context refuses first, so ask the rule itself
        with pytest.raises(BudgetError):
            assembly.admit_result(llm.plan, llm.memory, 4 * 2**20)


def test_a_file_replaced_while_it_is_opened_is_refused(model, tmp_path, monkeypatch):
    path, other = tmp_path / "m.flash", tmp_path / "other.flash"
    shutil.copyfile(model, path)
    shutil.copyfile(model, other)
    open_storage = assembly.opening.open_storage

    def replaced(*args, **options):
        os.replace(other, path)
        return open_storage(*args, **options)

    monkeypatch.setattr(assembly.opening, "open_storage", replaced)
    with pytest.raises(FlashReadError, match="replaced"):
        LLM(str(path), ram_budget=BUDGET)


@pytest.mark.parametrize("name, value", [("storage", "tape"), ("kernels", "abacus"),
                                         ("policy", "psychic")])  # fmt: skip
def test_unknown_names_list_the_known(model, name, value):
    with pytest.raises(UnknownNameError, match="known"):
        LLM(model, ram_budget=BUDGET, **{name: value})


def test_one_generation_at_a_time_and_none_after_close(model):
    llm = LLM(model, ram_budget=BUDGET)
    stream = llm.stream("abc", max_tokens=20)
    next(stream)
    with pytest.raises(BusyError):
        llm.generate("abc")
    stream.close()
    assert llm.generate("abc", max_tokens=2).tokens  # a dropped stream frees the handle
    llm.close()
    llm.close()
    with pytest.raises(ClosedError):
        llm.generate("abc")


def test_cancel_from_another_thread(model):
    with LLM(model, ram_budget=BUDGET) as llm:
        seen = []
        for delta in llm.stream("abc", max_tokens=50, ignore_eos=True):
            seen.append(delta)
            if len(seen) == 3:
                thread = threading.Thread(target=llm.cancel)
                thread.start()
                thread.join()
        assert seen[-1].finish_reason == "cancelled" and len(seen[-1].result.tokens) <= 4


def test_params_object_and_overlay(llm):
    params = SamplingParams(max_tokens=4, temperature=0)
    assert len(llm.generate("abc", params, ignore_eos=True).tokens) == 4


def test_invariants_hold_after_a_run(llm):
    llm.generate("abc", max_tokens=4)
    llm.store.check()
    llm.plan.ledger.check()
