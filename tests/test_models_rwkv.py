"""RWKV, every version: against a slow oracle, against itself in chunks and streamed, and against
the published logits of a trained model where that model is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from flashllm import LLM, convert

from .rwkv_models import VERSIONS, VOCAB, exported, official, oracle, written

DATA = Path(os.environ.get("FLASHLLM_DATA", Path(__file__).parents[2] / "shared" / "data")) / "rwkv"
BUDGET = "2GiB"
IDS = [int(i) for i in np.random.default_rng(3).integers(0, VOCAB, 23)]


@pytest.fixture(scope="module")
def containers(tmp_path_factory):
    """version -> container of the random model, kept as stored."""
    folder = tmp_path_factory.mktemp("rwkv")
    made = {}

    def of(version: str, **options) -> Path:
        key = (version, *sorted(options.items()))
        if key not in made:
            source = written(folder / f"{version}.bin", exported(official(version), version))
            made[key] = folder / f"{len(made)}.flash"
            report = convert(source, made[key], **options)
            assert report.warnings == [] and report.family == "rwkv"
        return made[key]

    return of


def logits_of(path, ids, **settings):
    with LLM(str(path), **{"ram_budget": BUDGET, **settings}) as llm:
        return llm.logits(ids)


@pytest.mark.parametrize("version", VERSIONS)
def test_logits_match_the_oracle(version, containers):
    expected = oracle(official(version), version, IDS)
    assert expected.std() > 0.5, "logits too small to notice a missing term"
    found = logits_of(containers(version), IDS)
    assert np.abs(found - expected).max() <= 1e-4


@pytest.mark.parametrize("version", VERSIONS)
def test_streamed_and_chunked_have_the_bits_of_resident(version, containers):
    path = containers(version)
    resident = logits_of(path, IDS)
    for settings in (
        {"pin": False},
        {"prefill_chunk": 1},
        {"prefill_chunk": 7, "num_threads": 3},
        {"pin": False, "prefill_chunk": 5, "storage": "pread"},
    ):
        np.testing.assert_array_equal(logits_of(path, IDS, **settings), resident, str(settings))


@pytest.mark.parametrize("version", VERSIONS)
def test_decode_continues_what_prefill_began(version, containers):
    with LLM(str(containers(version)), ram_budget=BUDGET) as llm:
        result = llm.generate(IDS[:9], max_tokens=6, temperature=0.0, ignore_eos=True)
        whole = llm.logits(IDS[:9] + result.tokens[:-1])
    assert result.tokens == [int(row.argmax()) for row in whole[8:]]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("quant", ["bf16", "int8"])
def test_quantised_weights_stay_close_and_stream_the_same(version, quant, containers):
    exact = logits_of(containers(version), IDS)
    path = containers(version, quant=quant)
    found = logits_of(path, IDS)
    assert np.sqrt(np.mean((found - exact) ** 2)) < 0.12 * exact.std()
    streamed = logits_of(path, IDS, pin=False, prefill_chunk=3)
    np.testing.assert_array_equal(streamed, found)


def test_the_state_has_one_size_for_any_context(containers):
    with LLM(str(containers("6")), ram_budget=BUDGET) as llm:
        lines = llm.plan.ledger.lines()
        assert llm.n_context == 2**30 and lines["state"] < 256 * 1024
        assert llm._engine.state.n_bytes <= lines["state"]


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")
@pytest.mark.parametrize(("kind", "limit"), [("FP32", 1e-4), ("FP16", 0.005), ("Q5_1", 0.4)])
def test_a_published_model_and_its_logits(kind, limit, tmp_path):
    expected = np.fromfile(DATA / "expected-logits-5v2-730K.bin", "<f4")
    convert(DATA / f"tiny-rwkv-5v2-730K-{kind}.bin", tmp_path / "m.flash")
    found = logits_of(tmp_path / "m.flash", [34, 105, 110])[-1]
    assert np.abs(found - expected).max() <= limit
    assert found.argmax() == expected.argmax()
