"""Recorded and repeated passes have the bits of passes that go through the interpreter."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from flashllm import LLM
from flashllm.errors import ClosedError, KernelError
from flashllm.kernels import choose_kernels
from flashllm.models.llama import LlamaModel

from .forced import nothing_recorded, opened, small_frames
from .kernel_planes import AVAILABLE, MemoryPlane, normal, same_bits

IDS = [3, 17, 40, 8, 8, 22, 61, 5]
# variant -> stretches that are repeated where all is in memory
WHOLE = {
    "llama-mha": 1, "llama-rope3": 1, "llama-ungated-silu": 1, "mistral-window": 1, "qwen2": 1,
    "qwen3": 1, "phi3": 1, "gemma2": 1, "gemma3": 1, "granite": 1, "granite-tied": 1,
    "nemotron-biases": 1, "llama-biases": 1, "llama-relu": 1, "llama-relu-biases": 2,
    "qwen3-moe": 2, "deepseek": 1,
}  # fmt: skip


def said(llm: LLM, **how) -> tuple:
    result = llm.generate(IDS, max_tokens=9, ignore_eos=True, logprobs=5, seed=3, **how)
    return result.tokens, result.logprobs


@pytest.fixture(params=WHOLE)
def model(request, tmp_path):
    return small_frames(tmp_path, request.param), WHOLE[request.param]


@pytest.mark.parametrize("kernels", ["serial", "auto"])
def test_tokens_are_the_same(model, monkeypatch, kernels):
    path, n_stretches = model
    with LLM(str(path), kernels=kernels, debug=True) as llm:
        found = [said(llm, temperature=0), said(llm), said(llm, temperature=0)]
        n_recorded = llm.model.repeats.n_recorded
    with monkeypatch.context() as patch:
        nothing_recorded(patch)
        with LLM(str(path), kernels=kernels, debug=True) as llm:
            assert found == [said(llm, temperature=0), said(llm), said(llm, temperature=0)]
            assert llm.model.repeats.n_recorded == 0
    assert n_recorded == n_stretches


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("whole", ["none", ("qkv", ".o"), ("gate", "up", "down")])
def test_what_streams_is_not_recorded(tmp_path, monkeypatch, share, whole):
    path = small_frames(tmp_path, "llama-mha")
    with LLM(str(path), debug=True) as llm:
        want = said(llm, temperature=0)
    with opened(path, monkeypatch, share=share, whole=whole) as llm:
        assert said(llm, temperature=0) == want
        # Two layers, and a stretch ends where something streams.
        assert llm.model.repeats.n_recorded == (0 if whole == "none" else 2)


def test_a_resize_between_tokens(tmp_path, monkeypatch):
    path = small_frames(tmp_path, "llama-mha")
    with LLM(str(path), debug=True) as llm:
        want = said(llm, temperature=0)[0]
        full = {name: plane.n_frames for name, plane in llm.model.planes.items()}
        tokens, counts = [], []
        for i, delta in enumerate(llm.stream(IDS, max_tokens=9, temperature=0, ignore_eos=True)):
            tokens += delta.tokens
            counts.append(llm.model.repeats.n_recorded)
            if i in (2, 5):
                kept = full if i == 5 else {**full, "layers.1.ffn": 0}
                llm.store.resize(kept, ring_stages=2)
        assert tokens == want
        assert counts[1] == 1 and counts[4] == 1 and counts[-1] == 1


def test_a_sequence_that_ended_is_not_kept(tmp_path):
    with LLM(str(small_frames(tmp_path, "llama-mha"))) as llm:
        together = llm.generate([IDS, IDS[:3]], max_tokens=4, temperature=0, ignore_eos=True)
        model = llm.model
        state = model.new_state(16, np.dtype(np.float32))
        out = np.zeros((1, model.config.vocab_size), np.float32)
        for token in IDS[:4]:
            llm._engine.step(np.array([token], np.int32), out, _totals(), state=state)
        assert model.repeats.n_recorded == 1
        keys = weakref.ref(state.keys.base.base)  # the pages
        del state
        gc.collect()
        assert keys() is None
        again = llm.generate([IDS, IDS[:3]], max_tokens=4, temperature=0, ignore_eos=True)
        assert [one.tokens for one in again] == [one.tokens for one in together]


def test_a_closed_engine_is_gone_at_once(tmp_path):
    """Its scratch is memory: a cycle would keep it until somebody collects."""
    path = str(small_frames(tmp_path, "llama-mha"))
    gc.collect()
    gc.disable()
    try:
        llm = LLM(path)
        llm.generate(IDS, max_tokens=4, temperature=0, ignore_eos=True)
        assert llm.model.repeats.n_recorded == 1
        model = weakref.ref(llm.model)
        llm.close()
        del llm
        assert model() is None
    finally:
        gc.enable()


def _totals():
    from flashllm.engine.totals import Totals

    return Totals()


def test_what_does_not_repeat_is_not_repeated(tmp_path, monkeypatch):
    """A part that does more than call operators is found out by its first repetition."""
    path = small_frames(tmp_path, "llama-mha")

    def scaled(self, name, added):
        added *= np.float32(0.5)

    monkeypatch.setattr(LlamaModel, "_norm_added", scaled)
    with LLM(str(path)) as llm:
        found = said(llm, temperature=0)
        assert llm.model.repeats.n_recorded == 0
    with monkeypatch.context() as patch:
        nothing_recorded(patch)
        with LLM(str(path)) as llm:
            assert found == said(llm, temperature=0)


@pytest.fixture(params=[name for name in AVAILABLE if name != "reference"])
def kernels(request):
    ks = choose_kernels(request.param, n_threads=2)
    ks.attention_scratch(8)
    yield ks
    ks.close()


def test_operators_repeat(kernels):
    """Each of them, on what its arrays hold when it is repeated."""
    plane, acts = MemoryPlane(normal((70, 100), 7), "int8"), kernels.activations(1, 100)
    x, y = normal((1, 100), 1), np.zeros((1, 70), np.float32)
    weight, bias = normal((100,), 2), normal((100,), 3)

    def work():
        kernels.add(x, weight[None])
        kernels.scale(x, 0.5)
        kernels.add_rms_norm(x, bias[None], weight, 1e-5, x)
        kernels.layer_norm(x, weight, bias, 1e-5, x)
        kernels.rms_norm(x, weight, 1e-5, x)
        kernels.clear(y)
        kernels.linear(acts, x, plane.addresses, plane.piece, 0, 70, y)

    with kernels.recording() as recorded:
        work()
    results = []
    for again in (work, lambda: kernels.repeat(recorded.calls, 0)):
        np.copyto(x, normal((1, 100), 9))
        y.fill(3.0)
        again()
        results.append((x.copy(), y.copy()))
    assert same_bits(results[0][0], results[1][0]) and same_bits(results[0][1], results[1][1])

    plane.addresses[1] = 0
    with pytest.raises(KernelError, match="absent"):
        kernels.repeat(recorded.calls, 0)


def test_positions(kernels):
    """A repeated attention is that of the position it is repeated at, and never beyond."""
    n, heads, dim = 8, 2, 16
    angles = normal((6, dim // 2), 5)
    rope = np.cos(angles), np.sin(angles)
    qkv = [normal((1, heads, dim), i) for i in range(3)]
    out = np.zeros((1, heads * dim), np.float32)
    caches = [[np.zeros((heads, n, dim), np.float32) for _ in range(2)] for _ in range(2)]
    outs: list[list[np.ndarray]] = [[], []]
    calls = None
    for position in range(6):
        for cache, found in zip(caches, outs, strict=True):
            for i, array in enumerate(qkv):
                np.copyto(array, normal(array.shape, 10 * position + i))
            if found is outs[1] and calls is not None:
                kernels.repeat(calls, position)
            else:
                with kernels.recording() as recorded:
                    kernels.attend_token(*qkv, rope, *cache, position, 3, 0.3, out)
                calls = recorded.calls if found is outs[1] else None
            found.append(out.copy())
        assert same_bits(outs[0][-1], outs[1][-1]) or position == 0
        if position == 0:
            calls = recorded.calls
    for a, b in zip(caches[0], caches[1], strict=True):
        assert same_bits(a, b)
    with pytest.raises(KernelError, match="position"):
        kernels.repeat(calls, 6)  # the rope's tables end
    kernels.close()
    with pytest.raises(ClosedError):
        kernels.repeat(calls, 1)


def test_what_depends_on_more_spoils_a_recording(kernels):
    x, out = normal((1, 40), 1), np.zeros(40, np.int32)
    with kernels.recording() as recorded:
        kernels.scale(x, 2.0)
        kernels.active_ids(x, out)
    assert recorded.calls is None
    with kernels.recording() as recorded:
        kernels.scale(x, 2.0)
    assert len(recorded.calls) == 1
    with pytest.raises(ZeroDivisionError), kernels.recording():
        raise ZeroDivisionError
    with kernels.recording() as empty:
        pass
    kernels.scale(x, 2.0)
    assert len(empty.calls) == 0


def test_the_reference_records_nothing():
    kernels = choose_kernels("reference", n_threads=1)
    with kernels.recording() as recorded:
        kernels.scale(normal((1, 4), 1), 2.0)
    assert recorded.calls is None


