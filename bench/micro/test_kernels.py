"""Kernels: bytes of weights per second beside memcpy of those bytes, products beside BLAS."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from flashllm.kernels import PieceView, choose_kernels, kernel_troubles
from flashllm.kernels.base import low_bit_row_bytes
from flashllm.quant import WEIGHT_TYPES
from flashllm.settings import usable_processors
from flashllm.units import align_up

SETS = [name for name, why in kernel_troubles().items() if why is None and name != "reference"]
N_ROWS, N_COLS = 4096, 2048  # an FFN plane: 32 MiB of float32, beyond the second-level caches


class Plane:
    """Rows of one weight type in one 64-byte-aligned buffer, four to a frame."""

    def __init__(self, weight_type: str):
        kind = WEIGHT_TYPES[weight_type]
        rows = np.random.default_rng(0).standard_normal((N_ROWS, N_COLS), dtype=np.float32)
        raw = kind.encode(rows)
        stride = align_up(raw.shape[1], 16)
        self.buffer = np.zeros(N_ROWS * stride + 64, np.uint8)
        start = -self.buffer.ctypes.data % 64
        self.bytes = self.buffer[start : start + N_ROWS * stride]
        self.bytes.reshape(N_ROWS, stride)[:, : raw.shape[1]] = raw
        self.piece = PieceView(kind.code, 4, stride, 0, N_COLS)
        frames = np.arange(N_ROWS // 4, dtype=np.uint64) * np.uint64(4 * stride)
        self.addresses = np.uint64(self.bytes.ctypes.data) + frames
        self.floats = kind.decode(raw, N_COLS)

    def memcpy(self):
        target = np.empty_like(self.bytes)
        target[:] = 0
        return lambda: np.copyto(target, self.bytes)


@pytest.fixture(scope="module", params=WEIGHT_TYPES.names())
def plane(request):
    return Plane(request.param)


@pytest.fixture(scope="module", params=SETS)
def kernels(request):
    made = choose_kernels(request.param, n_threads=usable_processors())
    made.attention_scratch(2048)
    yield made
    made.close()


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


def prepared(kernels, plane, n_tokens: int):
    acts, x = kernels.activations(n_tokens, N_COLS), normal(n_tokens, N_COLS)
    kernels.prepare(acts, x, plane.piece)
    return acts, x


def test_dot_all_rows(kernels, plane, against):
    acts, _ = prepared(kernels, plane, 1)
    out = np.empty((1, N_ROWS), np.float32)
    run = partial(kernels.dot_range, acts, plane.addresses, plane.piece, 0, N_ROWS, out)
    against(run, plane.memcpy(), "memcpy", n_bytes=plane.bytes.nbytes)


def test_dot_a_tenth_of_the_rows(kernels, plane, against):
    acts, _ = prepared(kernels, plane, 1)
    ids = np.sort(np.random.default_rng(2).choice(N_ROWS, N_ROWS // 10, replace=False))
    ids, out = ids.astype(np.int32), np.empty((1, len(ids)), np.float32)
    part = plane.bytes[: plane.bytes.nbytes // 10]
    target = np.zeros_like(part)
    run = partial(kernels.dot_ids, acts, plane.addresses, plane.piece, ids, out)
    against(run, lambda: np.copyto(target, part), "memcpy", n_bytes=part.nbytes)


def test_accumulate_all_rows(kernels, plane, against):
    coef, y = normal(1, N_ROWS), np.zeros((1, N_COLS), np.float32)
    run = partial(
        kernels.accumulate_range,
        coef, plane.addresses, plane.piece, 0, N_ROWS, y
    )
    against(run, plane.memcpy(), "memcpy", n_bytes=plane.bytes.nbytes)


def test_prefill_of_64_tokens(kernels, plane, against):
    acts, x = prepared(kernels, plane, 64)
    out, product = np.empty((64, N_ROWS), np.float32), np.empty((64, N_ROWS), np.float32)
    run = partial(kernels.dot_range, acts, plane.addresses, plane.piece, 0, N_ROWS, out)
    against(run, lambda: np.matmul(x, plane.floats.T, out=product), "NumPy BLAS, float32")


def test_decode_rows(kernels, plane, against):
    ids = np.arange(64, dtype=np.int32)
    out = np.empty((64, N_COLS), np.float32)
    target = np.empty_like(out)
    run = partial(kernels.decode_rows, plane.addresses, plane.piece, ids, out)
    against(run, lambda: np.copyto(target, plane.floats[:64]), "memcpy of the floats")


@pytest.mark.parametrize("n_planes", [1, 2, 4])
def test_low_bit(kernels, n_planes, against):
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 256, (N_ROWS, low_bit_row_bytes(N_COLS, n_planes)), np.uint8)
    acts = kernels.activations(1, N_COLS)
    kernels.prepare(acts, normal(1, N_COLS), PieceView.of_rows("int8", 1, N_COLS))
    out, target = np.empty(N_ROWS, np.float32), np.zeros_like(rows)
    run = partial(kernels.low_bit, acts, rows, n_planes, out)
    against(run, lambda: np.copyto(target, rows), "memcpy", n_bytes=rows.nbytes)


@pytest.mark.parametrize("n_tokens", [1, 64])
def test_attention(kernels, n_tokens, against):
    n_heads, n_kv, head_dim, n_keys = 32, 8, 64, 1024
    q, k = normal(n_tokens, n_heads, head_dim), normal(n_kv, n_keys, head_dim)
    v = normal(n_kv, n_keys, head_dim)
    out = np.empty((n_tokens, n_heads * head_dim), np.float32)
    run = partial(kernels.attention, q, k, v, n_keys - n_tokens, 0, 0.125, out)
    wide = np.ascontiguousarray(q.transpose(1, 0, 2)).reshape(n_kv, -1, head_dim)

    def products() -> None:
        np.matmul(np.matmul(wide, k.transpose(0, 2, 1)), v)

    against(run, products, "NumPy BLAS, products alone")


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_norms(kernels, name, against):
    x, weight, out = normal(1, N_COLS), normal(N_COLS), np.empty((1, N_COLS), np.float32)
    extra = (weight,) if name == "layer_norm" else ()
    run = partial(getattr(kernels, name), x, weight, *extra, 1e-5, out)
    against(run, lambda: x / np.sqrt((x * x).mean() + 1e-5) * weight, "NumPy expression")


@pytest.mark.parametrize("kind", ["relu", "silu", "gelu_tanh"])
def test_activate(kernels, kind, against):
    pre, up, out = normal(1, 8192), normal(1, 8192), np.empty((1, 8192), np.float32)
    run = partial(kernels.activate, kind, pre, up, out)
    against(run, lambda: pre / (1 + np.exp(-pre)) * up, "NumPy silu")


def test_active_ids(kernels, against):
    pre, out = normal(1, 8192) - 1.3, np.empty(8192, np.int32)
    run = partial(kernels.active_ids, pre, out)
    against(run, lambda: np.flatnonzero(pre[0] > 0), "NumPy flatnonzero")
