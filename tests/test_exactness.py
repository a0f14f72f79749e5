"""Streamed equals resident, bit for bit: over residency, mode, backend, codec, chunking, threads.

The models are wide enough that a plane has many frames; what is kept is forced onto the plan, since
a real budget for so small a model would keep all of it.
"""

from __future__ import annotations

import numpy as np
import pytest

from flashllm.conversion.enlarge import inflate
from flashllm.offload.sizing import DEMAND_BYTES
from flashllm.units import MIB

from .forced import opened
from .tiny import GOLDEN

IDS = [3, 17, 40, 8, 8, 22, 61, 5, 33, 12, 50]
KINDS = {
    "sparse gated": ("llama-relu", "int8", "raw"),
    "sparse ungated": ("llama-ungated-relu2", "int4", "raw"),
    "sparse zstd": ("llama-relu2", "bf16", "zstd"),
    "dense": ("llama-mha", "int8", "raw"),
    "dense planes": ("qwen3", "bf16", "planes"),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    variant, quant, codec = KINDS[request.param]
    path = tmp_path_factory.mktemp("exact") / "model.flash"
    inflate(GOLDEN / variant, path, size_bytes=6 * MIB, quant=quant, codec=codec, min_layers=2)
    return str(path)


def run(
    path: str, monkeypatch, *, share: float, mode: str = "adaptive",
    demand_bytes: int = DEMAND_BYTES, **settings,
):  # fmt: skip
    """(logits, greedy tokens) with `share` of every plane kept and a ring of 4 small stages."""
    store = {"mode": mode, "demand_bytes": demand_bytes}
    with opened(
        path, monkeypatch, share=share, store=store, ram_budget="1GiB", **settings
    ) as llm:
        logits = llm.logits(IDS)
        result = llm.generate(IDS, max_tokens=12, temperature=0, ignore_eos=True)
    return logits, result


@pytest.fixture(scope="module")
def resident(model):
    with pytest.MonkeyPatch.context() as patch:
        logits, result = run(model, patch, share=1.0)
    assert result.flash["misses"] == 0 and np.isfinite(logits).all()
    return logits, result.tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"share": 0.0},
        {"share": 0.4},
        {"share": 0.9},
        {"share": 0.4, "mode": "cached"},
        {"share": 0.1, "mode": "cached", "policy": "lfu"},
        {"share": 0.0, "mode": "cached"},
        {"share": 0.6, "mode": "cached", "policy": "window", "prefill_chunk": 2},
        {"share": 0.3, "prefill_chunk": 1},
        {"share": 0.3, "prefill_chunk": 4, "num_threads": 1},
        {"share": 1.0, "num_threads": 3},
        {"share": 0.5, "storage": "pread"},
        {"share": 0.5, "storage": "mmap", "mode": "cached"},
        {"share": 0.5, "storage": "mmap", "io_depth": 1},
    ],
    ids=str,
)
def test_bits_do_not_depend_on_how(model, resident, monkeypatch, settings):
    logits, result = run(model, monkeypatch, **settings)
    np.testing.assert_array_equal(logits, resident[0])
    assert result.tokens == resident[1]


@pytest.mark.parametrize("name", ["serial", "avx2", "avx512"])
def test_within_each_kernel_set_too(model, monkeypatch, name):
    from flashllm.kernels import kernel_troubles

    if kernel_troubles()[name]:
        pytest.skip(f"{name}: {kernel_troubles()[name]}")
    whole = run(model, monkeypatch, share=1.0, kernels=name)
    part = run(model, monkeypatch, share=0.3, kernels=name, prefill_chunk=3)
    np.testing.assert_array_equal(part[0], whole[0])
    assert part[1].tokens == whole[1].tokens


def test_kernel_sets_agree_within_tolerance(model, monkeypatch):
    """Sets may differ in bits, not in substance; the NumPy reference is the oracle."""
    reference = run(model, monkeypatch, share=1.0, kernels="reference")[0]
    best = run(model, monkeypatch, share=1.0)[0]
    # A quantised activation may round to its neighbour where sums differ in the last bit.
    assert np.abs(best - reference).max() <= 0.05 * reference.std()
