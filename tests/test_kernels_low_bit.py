"""Rows of bits, every set: values against the definition, the same bits for any division."""

import numpy as np
import pytest

from flashllm.errors import UsageError
from flashllm.kernels import PieceView, choose_kernels
from flashllm.kernels.base import MAX_PLANES, low_bit_row_bytes
from flashllm.kernels.reference import quantise

from .kernel_planes import AVAILABLE, normal, same_bits

SIZES = [1, 7, 31, 32, 33, 63, 64, 65, 100, 192, 2048]


@pytest.fixture(scope="module", params=AVAILABLE)
def kernels(request):
    ks = choose_kernels(request.param, n_threads=2)
    yield ks
    ks.close()


def prepared(ks, x):
    acts = ks.activations(len(x), x.shape[1])
    ks.prepare(acts, x, PieceView.of_rows("int8", 1, x.shape[1]))
    return acts


def random_rows(n_rows, n_cols, n_planes, seed=0):
    """(rows as bytes, their levels); the bits past n_cols are set, and must not matter."""
    codes = np.random.default_rng(seed).integers(0, 2**n_planes, (n_rows, n_cols))
    wide = np.full((n_rows, low_bit_row_bytes(n_cols, 1) * 8), 2**n_planes - 1)
    wide[:, :n_cols] = codes
    bits = (wide[:, None, :] >> np.arange(n_planes)[:, None]) & 1
    rows = np.packbits(bits.astype(np.uint8), axis=2, bitorder="little").reshape(n_rows, -1)
    return np.ascontiguousarray(rows), 2 * codes - 2**n_planes + 1


def run(ks, x, rows, n_planes):
    out = np.full(len(rows), np.nan, np.float32)
    ks.low_bit(prepared(ks, x), rows, n_planes, out)
    return out


@pytest.mark.parametrize("n_planes", range(1, MAX_PLANES + 1))
@pytest.mark.parametrize("n", SIZES)
def test_the_dot_of_levels_and_quantised_activations(kernels, n, n_planes):
    rows, levels = random_rows(13, n, n_planes, seed=n)
    x = normal((1, n), seed=n + 1)
    q, scales = quantise(x[0])
    xq = (q * scales[:, None]).reshape(-1)[:n].astype(np.float64)
    terms = np.abs(levels) @ np.abs(xq)
    assert (np.abs(run(kernels, x, rows, n_planes) - levels @ xq) <= terms * 2.0**-20).all()


def test_any_division_and_thread_count_gives_the_same_bits(kernels):
    rows, _ = random_rows(999, 200, 3)
    x = normal((1, 200), seed=5)
    whole = run(kernels, x, rows, 3)
    for cut in (1, 2, 5, 64):
        parts = [run(kernels, x, rows[:cut].copy(), 3), run(kernels, x, rows[cut:].copy(), 3)]
        assert same_bits(np.concatenate(parts), whole)
    with_one = choose_kernels(kernels.name, n_threads=1)
    assert same_bits(run(with_one, x, rows, 3), whole)
    with_one.close()


def test_refusals(kernels):
    rows, _ = random_rows(3, 64, 2)
    out = np.zeros(3, np.float32)
    acts = prepared(kernels, normal((1, 64)))
    for bad_rows, planes, bad_out in (
        (rows, 0, out), (rows, MAX_PLANES + 1, out), (rows, 3, out),
        (rows, 2, out[:2]), (rows.astype(np.int8), 2, out),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            kernels.low_bit(acts, bad_rows, planes, bad_out)
    with pytest.raises(UsageError, match="rows of bits"):
        kernels.low_bit(prepared(kernels, normal((2, 64))), rows, 2, out)
