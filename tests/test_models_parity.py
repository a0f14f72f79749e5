"""Every family against logits computed elsewhere, and against itself, on golden checkpoints.

The checkpoints under tests/golden are tiny and random (every 1-D tensor randomised, logits scaled);
their expected float32 logits were computed by an independent implementation (make_golden.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashllm import LLM, convert

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = sorted(path.parent.name for path in GOLDEN.glob("*/logits.npy"))
BUDGET = "2GiB"  # the budget is the whole process, and this one runs all the tests


def logits_of(path, ids, **settings):
    with LLM(str(path), **{"ram_budget": BUDGET, **settings}) as llm:
        return llm.logits(ids)


@pytest.fixture(scope="module")
def containers(tmp_path_factory):
    """variant -> container kept as stored; converted once."""
    folder = tmp_path_factory.mktemp("containers")
    made = {}

    def of(variant: str, **options) -> Path:
        key = (variant, *sorted(options.items()))
        if key not in made:
            made[key] = folder / f"{'-'.join(map(str, key))}.flash".replace("'", "")
            convert(str(GOLDEN / variant), str(made[key]), **options)
        return made[key]

    return of


def test_there_are_variants_to_test():
    assert len(VARIANTS) >= 12


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_the_independent_implementation(variant, containers):
    ids = np.load(GOLDEN / variant / "ids.npy").ravel()
    expected = np.load(GOLDEN / variant / "logits.npy").reshape(ids.size, -1)
    assert expected.std() >= 0.5, "logits too small to notice a missing term"
    found = logits_of(containers(variant), ids)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_streamed_and_chunked_have_the_bits_of_resident(variant, containers):
    path = containers(variant)
    ids = np.load(GOLDEN / variant / "ids.npy").ravel()
    resident = logits_of(path, ids)
    for settings in (
        {"pin": False},
        {"prefill_chunk": 1},
        {"prefill_chunk": 7, "num_threads": 3},
        {"pin": False, "prefill_chunk": 5, "storage": "pread"},
    ):
        np.testing.assert_array_equal(logits_of(path, ids, **settings), resident, str(settings))


@pytest.mark.parametrize("variant", VARIANTS)
def test_decode_continues_what_prefill_began(variant, containers):
    path = containers(variant)
    ids = list(np.load(GOLDEN / variant / "ids.npy").ravel()[:9])
    with LLM(str(path), ram_budget=BUDGET) as llm:
        result = llm.generate(ids, max_tokens=6, temperature=0.0, ignore_eos=True)
        whole = llm.logits(ids + result.tokens[:-1])
    assert result.tokens == [int(row.argmax()) for row in whole[len(ids) - 1 :]]


@pytest.mark.parametrize("quant", ["f16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("variant", ["llama-relu", "llama-mha", "opt", "mixtral", "deepseek"])
def test_quantised_weights_stay_close_and_stream_the_same(variant, quant, containers):
    ids = np.load(GOLDEN / variant / "ids.npy").ravel()
    exact = logits_of(containers(variant), ids)
    for codec in ("raw", "zstd"):
        path = containers(variant, quant=quant, codec=codec)
        found = logits_of(path, ids)
        # Random matrices of width 32 amplify rounding; trained models lose far less (README).
        limit = {"f16": 0.01, "bf16": 0.1, "int8": 0.12, "int4": 0.9}[quant]
        assert np.sqrt(np.mean((found - exact) ** 2)) < limit * exact.std()
        np.testing.assert_array_equal(logits_of(path, ids, pin=False, prefill_chunk=3), found)
