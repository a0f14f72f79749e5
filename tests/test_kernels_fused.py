"""linear, add_rms_norm and attend_token, every set: the bits of the operators that they name."""

from __future__ import annotations

import numpy as np
import pytest

from flashllm.errors import KernelError, UsageError
from flashllm.kernels import choose_kernels

from .kernel_planes import AVAILABLE, TYPES, MemoryPlane, normal, same_bits

N_ROWS, N_COLS, HEADS, KV_HEADS, DIM, CONTEXT = 70, 100, 6, 2, 40, 21


@pytest.fixture(scope="module", params=AVAILABLE)
def kernels(request):
    ks = choose_kernels(request.param, n_threads=2)
    ks.attention_scratch(CONTEXT)
    yield ks
    ks.close()


def plane_of(kind):
    return MemoryPlane(normal((N_ROWS, N_COLS), 7), kind)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_linear(kernels, kind, n_tokens):
    plane, x = plane_of(kind), normal((n_tokens, N_COLS), 5)
    acts = kernels.activations(3, N_COLS)
    out = [np.full((n_tokens, N_ROWS), 9.0, np.float32) for _ in range(2)]
    kernels.prepare(acts, x, plane.piece)
    kernels.dot_range(acts, plane.addresses, plane.piece, 4, 60, out[0])
    kernels.prepare(acts, normal((n_tokens, N_COLS), 6), plane.piece)
    kernels.linear(acts, x, plane.addresses, plane.piece, 4, 60, out[1])
    assert same_bits(*out) and acts.x is x
    kernels.dot_range(acts, plane.addresses, plane.piece, 60, N_ROWS, out[1])  # still prepared
    kernels.dot_range(acts, plane.addresses, plane.piece, 60, N_ROWS, out[0])
    assert same_bits(*out)


def test_linear_refuses(kernels):
    plane, acts = plane_of("int8"), kernels.activations(1, N_COLS)
    x, out = normal((1, N_COLS), 5), np.zeros((1, N_ROWS), np.float32)
    for bad in (normal((1, N_COLS + 1), 5), x.astype(np.float64), normal((2, N_COLS), 5)):
        with pytest.raises(UsageError):
            kernels.linear(acts, bad, plane.addresses, plane.piece, 0, N_ROWS, out)
    with pytest.raises(UsageError):
        kernels.linear(acts, x, plane.addresses, plane.piece, 0, N_ROWS, out[:, 1:].copy())
    plane.addresses[1] = 0
    with pytest.raises(KernelError):
        kernels.linear(acts, x, plane.addresses, plane.piece, 0, N_ROWS, out)


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_add_rms_norm(kernels, n_tokens):
    x, added, weight = normal((n_tokens, 77), 1), normal((n_tokens, 77), 2), normal((77,), 3)
    sums, out = x + added, [np.empty((n_tokens, 77), np.float32) for _ in range(2)]
    kernels.rms_norm(sums, weight, 1e-5, out[0])
    kernels.add_rms_norm(x, added, weight, 1e-5, out[1])
    assert same_bits(x, sums) and same_bits(*out)
    with pytest.raises(UsageError):
        kernels.add_rms_norm(x, added[:, :-1].copy(), weight, 1e-5, out[1])


# Halves' ties to even, the largest, what rounds up to infinity, subnormals, the least, zeros.
HARD = [1.0, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, 65519.9, 65520.0, 7e4, -np.inf, 2**-14,
        2**-14 - 2**-25, 3 * 2**-25, 2**-24, 2**-25, 2**-25 * 1.001, -(2**-26),
        0.0, -0.0]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("window, cap", [(0, 0.0), (7, 0.0), (0, 3.0)])
@pytest.mark.parametrize("n_turned", [DIM, 16, 0])
def test_attend_token(kernels, dtype, window, cap, n_turned):
    angles = normal((CONTEXT, n_turned // 2), 9)
    cosines, sines = np.cos(angles), np.sin(angles)
    memories = [np.zeros((2, KV_HEADS, CONTEXT, DIM), dtype) for _ in range(2)]
    for position in range(CONTEXT):
        rope = cosines[position : position + 1], sines[position : position + 1]
        seed = 10 * position
        q = normal((1, HEADS, DIM), seed)
        k, v = (normal((1, KV_HEADS, DIM), seed + i) for i in (1, 2))
        out = np.zeros((1, HEADS * DIM), np.float32)
        qs, ks, outs = ([a.copy(), a.copy()] for a in (q, k, out))
        if n_turned:
            kernels.rope(qs[0], *rope)
            kernels.rope(ks[0], *rope)
        for row, into in ((ks[0], memories[0][0]), (v, memories[0][1])):
            into[:, position] = row[0]
        kernels.attention(qs[0], *memories[0], position, window, 0.2, outs[0], cap=cap)
        kernels.attend_token(qs[1], ks[1], v, (cosines, sines), *memories[1], position, window, 0.2,
                             outs[1], cap=cap)  # fmt: skip
        assert same_bits(*outs) and same_bits(*qs) and same_bits(*ks)
        assert same_bits(*memories)


def test_what_is_kept_is_rounded_as_numpy_does(kernels):
    values = np.concatenate([HARD, normal((3000,), 4) * 10.0 ** normal((3000,), 5)])
    values = np.resize(values.astype(np.float32), (-(-values.size // DIM), DIM))
    keys, kept = (np.zeros((1, CONTEXT, DIM), np.float16) for _ in range(2))
    q, none = np.zeros((1, 1, DIM), np.float32), np.zeros((CONTEXT, 0), np.float32)
    out = np.zeros((1, DIM), np.float32)
    for i, row in enumerate(values):
        v = row.reshape(1, 1, DIM)
        kernels.attend_token(q, np.zeros_like(v), v, (none, none), keys, kept, i % CONTEXT, 0, 1.0,
                             out)  # fmt: skip
        with np.errstate(over="ignore"):
            assert same_bits(kept[0, i % CONTEXT], row.astype(np.float16))


def test_attend_token_refuses(kernels):
    good = {
        "q": normal((1, HEADS, DIM), 1), "k": normal((1, KV_HEADS, DIM), 2),
        "v": normal((1, KV_HEADS, DIM), 3), "rope": (normal((4, 4), 4), normal((4, 4), 5)),
        "keys": np.zeros((KV_HEADS, CONTEXT, DIM), np.float32),
        "values": np.zeros((KV_HEADS, CONTEXT, DIM), np.float32),
        "position": 3, "window": 0, "scale": 1.0, "out": np.zeros((1, HEADS * DIM), np.float32),
    }  # fmt: skip
    frozen = good["keys"].copy()
    frozen.flags.writeable = False
    for name, bad in [
        ("q", normal((2, HEADS, DIM), 1)), ("k", normal((1, KV_HEADS + 1, DIM), 2)),
        ("v", good["v"].astype(np.float16)), ("rope", (normal((4, DIM), 4), normal((4, DIM), 4))),
        ("rope", (normal((3, 4), 4), normal((3, 4), 5))),
        ("keys", frozen), ("keys", good["keys"].astype(np.float16)), ("position", CONTEXT),
        ("position", -1), ("window", -1), ("scale", 0.0), ("out", good["out"][:, 1:].copy()),
    ]:  # fmt: skip
        with pytest.raises(UsageError):
            kernels.attend_token(**{**good, name: bad})
