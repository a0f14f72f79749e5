"""Sampling: the rule for defaults, the cuts, reproducibility, errors that name the nearest name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashllm.engine.sampling import Sampler, SamplingParams, log_softmax
from flashllm.errors import UsageError

LOGITS = np.array([0.1, 2.0, -1.0, 2.0, 1.5, -3.0], np.float32)


def sampler(**params) -> Sampler:
    resolved = SamplingParams.from_kwargs(**params).resolved({})
    return Sampler(resolved, np.array([0], np.int32))


def test_greedy_is_the_default_and_ties_go_to_the_lowest_id():
    assert sampler().sample(LOGITS) == 1


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, 0.0),
        ({"temperature": 0.6}, 0.0),  # do_sample absent: greedy
        ({"do_sample": False, "temperature": 0.6}, 0.0),
        ({"do_sample": True, "temperature": 0.6}, 0.6),
        ({"do_sample": True}, 1.0),
    ],
)
def test_generation_config_decides_only_when_it_samples(config, expected):
    assert SamplingParams().resolved(config).temperature == expected
    assert SamplingParams(temperature=0.3).resolved(config).temperature == 0.3


def test_same_seed_same_tokens_and_the_seed_used_is_told():
    drawn = [
        [s.sample(LOGITS) for _ in range(50)]
        for s in (sampler(temperature=1.0, seed=3), sampler(temperature=1.0, seed=3))
    ]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1
    assert isinstance(SamplingParams().resolved({}).seed, int)


@pytest.mark.parametrize(
    "cut, allowed",
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.01}, {1}),
        ({"min_p": 0.999}, {1, 3}),
        ({"min_p": 0.5}, {1, 3, 4}),
    ],
)
def test_cuts_keep_what_they_name(cut, allowed):
    s = sampler(temperature=1.0, seed=5, **cut)
    assert {s.sample(LOGITS) for _ in range(200)} == allowed


def test_draws_follow_the_distribution():
    s = sampler(temperature=1.0, seed=11)
    drawn = np.bincount([s.sample(LOGITS) for _ in range(20000)], minlength=6) / 20000
    np.testing.assert_allclose(drawn, np.exp(log_softmax(LOGITS)), atol=0.015)


def test_penalties_push_repeated_tokens_down():
    s = sampler(frequency_penalty=5.0)
    assert [s.sample(LOGITS) for _ in range(3)] == [1, 3, 4]
    s = sampler(repetition_penalty=10.0)
    assert [s.sample(LOGITS) for _ in range(2)] == [1, 3]


@pytest.mark.parametrize(
    "wrong, hint",
    [
        ({"temperatur": 1.0}, "temperature"),
        ({"max_token": 3}, "max_tokens"),
        ({"max_tokens": 3, "max_new_tokens": 3}, "twice"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": ["", "x"]}, "stop"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_parameters_are_refused_by_name(wrong, hint):
    with pytest.raises(UsageError, match=hint):
        SamplingParams.from_kwargs(**wrong)


def test_aliases_and_overlay():
    base = SamplingParams(temperature=0.5)
    made = SamplingParams.from_kwargs(base, max_new_tokens=7, repeat_penalty=1.1)
    assert (made.temperature, made.max_tokens, made.repetition_penalty) == (0.5, 7, 1.1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    st.floats(0.05, 5.0),
    st.floats(0.0, 1.0),
    st.integers(0, 50),
    st.floats(0.0, 1.0),
)
def test_any_logits_give_a_valid_id(logits, temperature, top_p, top_k, min_p):
    s = sampler(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=1)
    assert 0 <= s.sample(np.array(logits, np.float32)) < len(logits)
