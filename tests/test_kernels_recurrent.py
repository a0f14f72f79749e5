"""RWKV's operators, every set: values against the NumPy twin, canonical bits, refusals.

The twin itself is held to papers and published logits by test_models_rwkv.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from flashllm.errors import UnknownNameError, UsageError
from flashllm.kernels import choose_kernels
from flashllm.kernels.recurrent import SHARES, VECTORS_7

from .kernel_planes import AVAILABLE, NATIVE, normal, same_bits

HEADS = [(1, 1), (3, 7), (2, 16), (3, 20), (2, 64), (1, 130)]
T = 9
EPS = 64e-5


@pytest.fixture(scope="module", params=AVAILABLE)
def kernels(request):
    ks = choose_kernels(request.param, n_threads=1)
    yield ks
    ks.close()


@pytest.fixture(scope="module")
def reference():
    return choose_kernels("reference")


def tokens_of(names, n, seed=0):
    return {name: normal((T, n), seed + i) for i, name in enumerate(names)}


def vectors_of(names, n):
    return {name: normal(n, 50 + i) for i, name in enumerate(names)}


class Run:
    """One sequence of random tokens through one operator: `run(ks, chunks)` gives all it wrote."""

    def __init__(self, version, n_heads, d):
        self.version, self.n, self.n_heads, self.d = version, n_heads * d, n_heads, d

    def __call__(self, ks, chunks=((0, T),)):
        n, version = self.n, self.version
        out = np.full((T, n), np.nan, np.float32)
        if version == "4":
            memory, exponent = normal((2, n), 1), normal(n, 2)
            memory[1] = np.abs(memory[1]) + 1
            tokens, vectors = tokens_of("rkv", n), vectors_of(("decay", "first"), n)
            vectors["decay"] = -np.abs(vectors["decay"])
            for a, b in chunks:
                r, k, v = (tokens[x][a:b].copy() for x in "rkv")
                ks.rwkv4(r, k, v, vectors["decay"], vectors["first"], memory, exponent, out[a:b])
            return {"out": out, "memory": memory, "exponent": exponent}
        memory = normal((self.n_heads, self.d, self.d), 3, scale=0.5)
        if version in ("5.1", "5.2", "6"):
            names = ["r", "k", "v"] + ["g"] * (version != "5.1") + ["decay"] * (version == "6")
            vectors = vectors_of(("first", "decay", "head_norm.weight", "head_norm.bias"), n)
            if version != "6":
                vectors["decay"] = np.exp(-np.exp(vectors["decay"]))
            operator = ks.rwkv5
        else:
            names = ["r", "k", "v", "gate", "decay", "rate", "first_v"]
            names += ["share"] * (version == "7")
            vectors, operator = vectors_of(VECTORS_7, n), ks.rwkv7
        tokens = tokens_of(names, n)
        for a, b in chunks:
            part = {name: values[a:b] for name, values in tokens.items()}
            operator(part, vectors, EPS, memory, out[a:b])
        return {"out": out, "memory": memory} | {x: tokens[x] for x in ("v", "first_v")
                                                 if x in tokens}  # fmt: skip


VERSIONS = ["4", "5.1", "5.2", "6", "7", "7, first layer"]


@pytest.mark.parametrize("n_heads, d", HEADS)
@pytest.mark.parametrize("version", VERSIONS)
def test_recurrences_agree_with_the_numpy_twin(kernels, reference, version, n_heads, d):
    run = Run(version, n_heads, d)
    ours, oracle = run(kernels), run(reference)
    for name, expected in oracle.items():
        room = 2.0**-18 * np.abs(expected).max()
        if name == "out" and version != "4":  # a norm over a head of equal values amplifies
            room = 2.0**-16 * np.abs(expected).max()
        assert np.abs(ours[name] - expected).max() <= room, name


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("version", VERSIONS)
def test_chunks_and_threads_change_no_bit(name, version):
    run = Run(version, 5, 20)
    one, three = (choose_kernels(name, n_threads=n) for n in (1, 3))
    whole = run(one)
    for ks, chunks in (
        (one, [(t, t + 1) for t in range(T)]),
        (three, [(0, 4), (4, T)]),
        (three, [(0, T)]),
    ):
        for key, found in run(ks, chunks).items():
            assert same_bits(found, whole[key]), (key, chunks)
    one.close()
    three.close()


def test_threads_change_no_bit_where_there_is_work_for_them():
    n_heads, d = 16, 64
    for version in VERSIONS:
        run = Run(version, n_heads, d)
        found = []
        for n_threads in (1, 4):
            ks = choose_kernels(None, n_threads=n_threads)
            found.append(run(ks))
            ks.close()
        assert all(same_bits(found[0][key], found[1][key]) for key in found[0]), version


def test_version_4_survives_an_empty_memory_and_large_keys(kernels):
    n = 19
    memory, exponent = np.zeros((2, n), np.float32), np.full(n, -1e30, np.float32)
    r, k, v = np.full((2, n), 50, np.float32), np.full((2, n), 200, np.float32), normal((2, n))
    out = np.empty_like(r)
    decay, first = np.full(n, -1, np.float32), np.zeros(n, np.float32)
    kernels.rwkv4(r, k, v, decay, first, memory, exponent, out)
    assert np.abs(out[0] - v[0]).max() <= 1e-6  # nothing before: the value itself
    assert np.isfinite(out).all() and np.isfinite(memory).all() and (exponent == 200).all()


def test_version_7_survives_a_key_of_zeros(kernels):
    n = 32
    tokens = {name: np.zeros((1, n), np.float32)
              for name in ("r", "k", "v", "gate", "decay", "rate", "first_v")}  # fmt: skip
    memory, out = normal((2, 16, 16)), np.full((1, n), np.nan, np.float32)
    kernels.rwkv7(tokens, vectors_of(VECTORS_7, n), EPS, memory, out)
    assert (out == 0).all() and np.isfinite(memory).all()


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize("n", [1, 17, 64, 100])
def test_mixes_agree_with_the_numpy_twin(kernels, reference, kind, n):
    x, last = normal((5, n)), normal(n, 1)
    shares = tuple(normal(n, 2 + i) for i in range(3))
    ours, oracle = normal((3, 5, n), 9), normal((3, 5, n), 9)
    whole = ours.copy()
    kernels.mix_tokens(kind, x, last, shares, ours)
    reference.mix_tokens(kind, x, last, shares, oracle)
    assert np.abs(ours - oracle).max() <= 2.0**-20 * np.abs(oracle).max()
    for t in range(5):
        before = x[t - 1].copy() if t else last
        one = np.ascontiguousarray(whole[:, t : t + 1])
        kernels.mix_tokens(kind, x[t : t + 1].copy(), before, shares, one)
        assert same_bits(one[:, 0].copy(), ours[:, t].copy())


def test_what_does_not_fit_is_refused(kernels):
    x, last = normal((2, 4)), normal(4)
    out = np.empty((1, 2, 4), np.float32)
    with pytest.raises(UnknownNameError, match="future.*now, past, past plus"):
        kernels.mix_tokens("future", x, last, (last,), out)
    with pytest.raises(UsageError, match="share must have shape"):
        kernels.mix_tokens("now", x, last, (normal(5),), out)
    with pytest.raises(UsageError, match="9 mixes"):
        kernels.mix_tokens("now", x, last, (last,) * 9, np.empty((9, 2, 4), np.float32))
    with pytest.raises(UsageError, match="exponent must have shape"):
        kernels.rwkv4(x, x, x, last, last, normal((2, 4)), normal(3), x)
    vectors = vectors_of(("first", "decay", "head_norm.weight", "head_norm.bias"), 4)
    for shape in ((1, 4, 3), (2, 3, 3), (1, 600, 600)):
        with pytest.raises(UsageError, match="memory|out must"):
            kernels.rwkv5({x: normal((2, 4)) for x in "rkv"}, vectors, EPS, normal(shape), x)
    tokens = {name: normal((2, 4)) for name in ("r", "k", "v", "gate", "decay", "rate")}
    tokens["first_v"] = normal((1, 4))
    with pytest.raises(UsageError, match="first_v must have shape"):
        kernels.rwkv7(tokens, vectors_of(VECTORS_7, 4), EPS, normal((1, 4, 4)), x)
