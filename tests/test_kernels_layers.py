"""Norms, rope, activations, attention, every set: values, canonical bits, refusals."""

import numpy as np
import pytest

from flashllm.errors import ClosedError, UnknownNameError, UsageError
from flashllm.kernels import choose_kernels
from flashllm.kernels.base import ACTIVATIONS

from .kernel_planes import AVAILABLE, NATIVE, normal, same_bits

SIZES = [1, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 4096]


@pytest.fixture(scope="module", params=AVAILABLE)
def kernels(request):
    ks = choose_kernels(request.param, n_threads=2)
    ks.attention_scratch(256)
    yield ks
    ks.close()


@pytest.fixture(scope="module")
def reference():
    return choose_kernels("reference")


# ------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("n", SIZES)
def test_norms_agree_with_reference(kernels, reference, n, offset):
    x, weight, bias = normal((5, n)) + np.float32(offset), normal(n, 1), normal(n, 2)
    x[2] = 0
    results = []
    for ks in (kernels, reference):
        rms, layer = np.empty_like(x), np.empty_like(x)
        ks.rms_norm(x, weight, 1e-5, rms)
        ks.layer_norm(x, weight, bias, 1e-5, layer)
        results.append((rms, layer))
    (rms, layer), (rms_oracle, layer_oracle) = results
    room = 2.0**-20 * (np.abs(rms_oracle) + np.abs(weight))
    assert (np.abs(rms - rms_oracle) <= room).all()
    # A mean far from zero takes away that many bits of every difference from it.
    spread = np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    room = 2.0**-20 * (np.abs(layer_oracle) + np.abs(bias) + np.abs(weight) * (1 + offset / spread))
    assert (np.abs(layer - layer_oracle) <= room).all()


@pytest.mark.parametrize("n", [17, 100])
def test_norms_are_row_by_row_and_in_place(kernels, n):
    x, weight, bias = normal((9, n)), normal(n, 1), normal(n, 2)
    rms, layer = np.empty_like(x), np.empty_like(x)
    kernels.rms_norm(x, weight, 1e-6, rms)
    kernels.layer_norm(x, weight, bias, 1e-6, layer)
    for r in range(9):
        row = x[r : r + 1].copy()
        kernels.rms_norm(row, weight, 1e-6, row)
        assert same_bits(row[0], rms[r])
        row = x[r : r + 1].copy()
        kernels.layer_norm(row, weight, bias, 1e-6, row)
        assert same_bits(row[0], layer[r])


# ------------------------------------------------------------------------------------------- rope


@pytest.mark.parametrize(
    "head_dim, rot", [(2, 2), (6, 4), (64, 64), (80, 32), (100, 100), (128, 2)]
)
def test_rope_agrees_with_reference_token_by_token(kernels, reference, head_dim, rot):
    x, angle = normal((5, 3, head_dim)), normal((5, rot // 2), 1, scale=3)
    cosines, sines = np.cos(angle), np.sin(angle)
    ours, oracle = x.copy(), x.copy()
    kernels.rope(ours, cosines, sines)
    reference.rope(oracle, cosines, sines)
    assert (np.abs(ours - oracle) <= 2.0**-22 * 2 * np.abs(x).max()).all()
    assert same_bits(ours[:, :, rot:].copy(), x[:, :, rot:].copy())
    for t in range(5):
        one = x[t : t + 1].copy()
        kernels.rope(one, cosines[t : t + 1], sines[t : t + 1])
        assert same_bits(one[0], ours[t])


# ------------------------------------------------------------------------------------- activations

EDGES = [0.0, -0.0, 1e-40, -1e-40, 1e-6, 0.5, -0.5, 3, -3, 20, -20, 87, -87, 88.5, -88.5, 104, -104,
         1e4, -1e4, 1e19, -1e19]  # fmt: skip


@pytest.mark.parametrize("with_up", [False, True])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_agree_with_reference(kernels, reference, kind, with_up):
    pre = np.concatenate([normal(1000, scale=4), np.array(EDGES, np.float32)])[None]
    up = normal(pre.shape, 1) if with_up else None
    ours, oracle = np.empty_like(pre), np.empty_like(pre)
    kernels.activate(kind, pre, up, ours)
    reference.activate(kind, pre, up, oracle)
    share = 2.0**-18 if kind == "gelu_tanh" else 2.0**-20
    room = share * np.abs(oracle) + 2.0**-60
    if kind == "gelu":  # 1 + erf cancels on the negative side
        room += 2.0**-22 * np.abs(pre) * (1 if up is None else np.abs(up))
    if kind == "gelu_tanh":  # exp(-2u) carries the error of u, which is large where out is tiny
        room += 2.0**-24 * (pre < -2)
    if kind == "tanh":  # 1 - 2 / (1 + exp(2x)) cancels around zero
        room += 2.0**-22 * (1 if up is None else np.abs(up))
    assert (np.abs(ours - oracle) <= room).all()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_know_infinity_and_nan(kernels, kind):
    pre = np.array([[np.inf, np.nan, 1.0]], dtype=np.float32)
    out = np.empty_like(pre)
    kernels.activate(kind, pre, None, out)
    largest = 1 if kind in ("sigmoid", "tanh") else np.inf
    assert out[0, 0] == largest and np.isnan(out[0, 1]) and np.isfinite(out[0, 2])


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_do_not_depend_on_place(kernels, kind):
    pre, up = normal((1, 257), scale=5), normal((1, 257), 1)
    whole = np.empty_like(pre)
    kernels.activate(kind, pre, up, whole)
    for start, stop in [(0, 1), (1, 18), (3, 257), (100, 131)]:
        part = pre[:, start:stop].copy()
        kernels.activate(kind, part, up[:, start:stop].copy(), part)  # in place
        assert same_bits(part, whole[:, start:stop].copy())


def test_unknown_activation_lists_the_known(kernels):
    x = normal((1, 4))
    known = "gelu, gelu_tanh, relu, relu2, sigmoid, silu, tanh"
    with pytest.raises(UnknownNameError, match=f"swish.*{known}"):
        kernels.activate("swish", x, None, x)


@pytest.mark.parametrize("n_tokens, n", [(1, 1), (1, 255), (3, 256), (5, 1000)])
def test_active_ids(kernels, n_tokens, n):
    pre = normal((n_tokens, n)) - 1
    pre[0, 0] = np.nan
    out = np.full(n, -1, dtype=np.int32)
    found = kernels.active_ids(pre, out)
    assert out[:found].tolist() == np.flatnonzero((pre > 0).any(axis=0)).tolist()
    assert (out[found:] == -1).all()
    assert kernels.active_ids(np.zeros((2, n), np.float32), out) == 0


# -------------------------------------------------------------------------------------- attention


def attend(ks, q, k, v, first, window=0, cap=0.0):
    out = np.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=np.float32)
    ks.attention(q, k, v, first, window, q.shape[2] ** -0.5, out, cap=cap)
    return out


@pytest.mark.parametrize("kv_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("window", [0, 1, 5, 33])
@pytest.mark.parametrize(
    "n_heads, n_kv_heads, head_dim",
    [(1, 1, 16), (4, 4, 64), (8, 2, 64), (6, 2, 20), (7, 1, 33), (5, 1, 576)],
)
def test_attention_agrees_with_reference(
    kernels, reference, n_heads, n_kv_heads, head_dim, window, kv_dtype
):
    q = normal((7, n_heads, head_dim), scale=2)
    k, v = (normal((n_kv_heads, 90, head_dim), s).astype(kv_dtype) for s in (1, 2))
    for first in (0, 1, 40, 83):
        ours, oracle = (attend(ks, q, k, v, first, window) for ks in (kernels, reference))
        assert (np.abs(ours - oracle) <= 2.0**-17 * np.abs(v).max()).all()


@pytest.mark.parametrize("cap", [0.5, 3.0, 50.0])
@pytest.mark.parametrize("window", [0, 5])
def test_soft_capped_attention(kernels, reference, cap, window):
    q = normal((7, 6, 20), scale=6)
    k, v = normal((2, 90, 20), 1), normal((2, 90, 20), 2)
    for first in (0, 40):
        ours, oracle = (attend(ks, q, k, v, first, window, cap) for ks in (kernels, reference))
        assert (np.abs(ours - oracle) <= 2.0**-17 * np.abs(v).max()).all()
        single = [attend(kernels, q[t : t + 1], k, v, first + t, window, cap) for t in range(7)]
        assert same_bits(ours, np.concatenate(single))
    assert not np.allclose(ours, attend(kernels, q, k, v, first, window), atol=1e-3)
    with pytest.raises(UsageError, match="cap"):
        attend(kernels, q, k, v, 0, window, -1.0)


@pytest.mark.parametrize("kv_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("window", [0, 1, 5, 20])
@pytest.mark.parametrize("n_heads, n_kv_heads, head_dim", [(4, 4, 64), (6, 2, 20), (7, 1, 33)])
def test_attention_in_chunks_is_attention_token_by_token(
    kernels, n_heads, n_kv_heads, head_dim, window, kv_dtype
):
    n = 50
    q = normal((n, n_heads, head_dim), scale=2)
    k, v = (normal((n_kv_heads, 64, head_dim), s).astype(kv_dtype) for s in (1, 2))
    single = np.concatenate([attend(kernels, q[t : t + 1], k, v, t, window) for t in range(n)])
    assert same_bits(attend(kernels, q, k, v, 0, window), single)
    for chunk in (2, 3, 7, 16):
        parts = [attend(kernels, q[t : t + chunk], k, v, t, window) for t in range(0, n, chunk)]
        assert same_bits(np.concatenate(parts), single)


def test_attention_never_reads_the_future_or_beyond_the_window(kernels):
    q = normal((3, 4, 16))
    k, v = normal((2, 40, 16), 1), normal((2, 40, 16), 2)
    clean = attend(kernels, q, k, v, 20, 8)
    for array in (k, v):
        array[:, 23:] = np.nan
        array[:, :13] = np.nan
    assert same_bits(attend(kernels, q, k, v, 20, 8), clean)
    v[:, 22] = np.inf  # seen by the last token alone
    out = attend(kernels, q, k, v, 20, 8)
    assert same_bits(out[:2], clean[:2]) and not np.isfinite(out[2]).any()


def test_attention_does_not_depend_on_the_contexts_size(kernels):
    q = normal((5, 2, 32))
    k, v = normal((2, 200, 32), 1), normal((2, 200, 32), 2)
    small = attend(kernels, q, k[:, :31].copy(), v[:, :31].copy(), 26)
    assert same_bits(attend(kernels, q, k, v, 26), small)


def test_attention_survives_large_scores(kernels, reference):
    q, k, v = normal((2, 1, 16), scale=60), normal((1, 30, 16), 1, scale=60), normal((1, 30, 16), 2)
    ours, oracle = (attend(ks, q, k, v, 28) for ks in (kernels, reference))
    assert np.isfinite(ours).all() and np.allclose(ours, oracle, atol=1e-2)


@pytest.mark.parametrize("name", NATIVE)
def test_threads_change_nothing(name):
    q, x = normal((40, 8, 64)), normal((40, 4096))
    k, v = normal((4, 200, 64), 1), normal((4, 200, 64), 2)
    results = []
    for n_threads in (1, 2, 3, 7):
        ks = choose_kernels(name, n_threads=n_threads)
        ks.attention_scratch(200)
        active = np.empty_like(x)
        ks.activate("silu", x, None, active)
        results.append((attend(ks, q, k, v, 150), active))
        ks.close()
    for attended, active in results[1:]:
        assert same_bits(attended, results[0][0]) and same_bits(active, results[0][1])


@pytest.mark.parametrize("name", NATIVE)
def test_attention_scratch_is_made_beforehand_and_counted(name):
    ks = choose_kernels(name, n_threads=2)
    q, k = normal((1, 1, 16)), normal((1, 300, 16))
    with pytest.raises(UsageError, match="attention_scratch was made for 0"):
        attend(ks, q, k, k, 0)
    n_bytes = ks.attention_scratch(300)
    assert n_bytes == 2 * 4 * (304 + 16) * 4
    assert ks.attention_scratch(100) == n_bytes
    attend(ks, q, k, k, 299)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"first": 249}, "outside the 250"),
        ({"first": -1}, "outside"),
        ({"window": -1}, "window"),
        ({"k": normal((3, 250, 16))}, "v must have shape"),
        ({"k": normal((4, 250, 16)), "v": normal((4, 250, 16))}, "cannot share"),
        ({"k": normal((2, 250, 16)).astype(np.float64)}, "k must be float32"),
        ({"q": normal((2, 6, 16))[:, ::2]}, "C-contiguous"),
    ],
)
def test_attention_refuses_wrong_arguments(kernels, change, match):
    arguments = {"q": normal((2, 6, 16)), "k": normal((2, 250, 16)), "v": normal((2, 250, 16)),
                 "first": 0, "window": 0} | change  # fmt: skip
    with pytest.raises(UsageError, match=match):
        attend(kernels, *(arguments[key] for key in ("q", "k", "v", "first", "window")))


def test_a_closed_set_says_so():
    for name in AVAILABLE:
        ks = choose_kernels(name, n_threads=2)
        ks.close()
        ks.close()
        x = normal((1, 4))
        with pytest.raises(ClosedError, match=name):
            ks.rms_norm(x, x[0], 1e-5, x)
