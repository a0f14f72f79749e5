"""Dots, accumulate and decode_rows, every set x weight type: values, canonical bits, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashllm.errors import KernelError, UsageError
from flashllm.kernels import PieceView, choose_kernels
from flashllm.kernels.reference import quantise

from .kernel_planes import AVAILABLE, NATIVE, TYPES, MemoryPlane, normal, same_bits

SIZES = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 384, 4096]


@pytest.fixture(scope="module", params=AVAILABLE)
def kernels(request):
    ks = choose_kernels(request.param, n_threads=2)
    yield ks
    ks.close()


@pytest.fixture(scope="module")
def reference():
    return choose_kernels("reference")


def dot(ks, plane, x, *, ids=None, start=0, stop=None):
    """[T, items] by ids or by range."""
    acts = ks.activations(len(x), x.shape[1])
    ks.prepare(acts, x, plane.piece)
    if ids is not None:
        out = np.full((len(x), len(ids)), np.nan, dtype=np.float32)
        ks.dot_ids(acts, plane.addresses, plane.piece, ids, out)
        return out
    out = np.full((len(x), stop), np.nan, dtype=np.float32)
    ks.dot_range(acts, plane.addresses, plane.piece, start, stop, out)
    assert np.isnan(out[:, :start]).all()
    return out[:, start:]


def dot_terms(plane, x):
    """Sum of |terms| per token and item."""
    return np.abs(x).astype(np.float64) @ np.abs(plane.rows).astype(np.float64).T


def accumulate(ks, plane, coef, y, *, ids=None, start=0):
    y = y.copy()
    if ids is not None:
        ks.accumulate_ids(coef, plane.addresses, plane.piece, ids, y)
    else:
        stop = start + coef.shape[1]
        ks.accumulate_range(coef, plane.addresses, plane.piece, start, stop, y)
    return y


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("weight_type", TYPES)
def test_dots_agree_with_reference(kernels, reference, weight_type, n):
    plane = MemoryPlane(normal((11, n), seed=n), weight_type)
    x = normal((3, n), seed=n + 1)
    ours, oracle = (dot(ks, plane, x, stop=11) for ks in (kernels, reference))
    assert (np.abs(ours - oracle) <= dot_terms(plane, x) * 2.0**-20 + 1e-30).all()
    # The oracle itself, against the definition: quantised activations are 0.5 / 127 off at worst.
    slack = 2.0**-20 if weight_type in ("f32", "f16", "bf16") else 0
    room = np.abs(plane.rows).sum(axis=1) * np.abs(x).max() / 250 if not slack else 0
    exact = x.astype(np.float64) @ plane.rows.T
    assert (np.abs(oracle - exact) <= room + dot_terms(plane, x) * 2.0**-20).all()


@pytest.mark.parametrize("weight_type", TYPES)
def test_long_one_sided_sums_stay_in_tolerance(kernels, reference, weight_type):
    plane = MemoryPlane(np.abs(normal((5, 14336))), weight_type)
    x = np.abs(normal((2, 14336), seed=1))
    ours, oracle = (dot(ks, plane, x, stop=5) for ks in (kernels, reference))
    assert (np.abs(ours - oracle) <= dot_terms(plane, x) * 2.0**-20).all()


@pytest.mark.parametrize("n", [33, 70, 100, 384, 8224])
@pytest.mark.parametrize("weight_type", TYPES)
def test_dots_do_not_depend_on_the_number_of_tokens(kernels, weight_type, n):
    """Blocks of tokens, rests of blocks, and rows that are too long for blocks."""
    plane = MemoryPlane(normal((13, n)), weight_type)
    x = normal((33, n), seed=1)
    single = np.concatenate([dot(kernels, plane, x[t : t + 1], stop=13) for t in range(33)])
    for n_tokens in [*range(2, 10), 16, 33]:
        assert same_bits(dot(kernels, plane, x[:n_tokens], stop=13), single[:n_tokens])


@pytest.mark.parametrize("weight_type", TYPES)
def test_range_ids_and_leases_give_the_same_bits(kernels, weight_type):
    plane = MemoryPlane(normal((131, 100)), weight_type, per_frame=3)
    x = normal((5, 100), seed=1)
    whole = dot(kernels, plane, x, stop=131)
    assert same_bits(dot(kernels, plane, x, ids=np.arange(131, dtype=np.int32)), whole)
    some = np.array([0, 1, 2, 7, 50, 64, 65, 66, 129, 130], dtype=np.int32)
    assert same_bits(dot(kernels, plane, x, ids=some), whole[:, some])
    for start, stop in [(0, 1), (1, 4), (5, 130), (64, 131), (7, 7)]:
        part = dot(kernels, plane, x, start=start, stop=stop)
        assert same_bits(part, np.ascontiguousarray(whole[:, start:stop]))


@pytest.mark.parametrize(
    "per_frame, lead, tail", [(1, 0, 0), (3, 16, 0), (5, 48, 32), (131, 0, 16)]
)
@pytest.mark.parametrize("weight_type", TYPES)
def test_placement_changes_nothing(kernels, weight_type, per_frame, lead, tail):
    rows, x = normal((131, 65)), normal((2, 65), seed=1)
    coef = normal((2, 131), seed=2)
    plain = MemoryPlane(rows, weight_type)
    moved = MemoryPlane(rows, weight_type, per_frame=per_frame, lead=lead, tail=tail, seed=9)
    assert same_bits(dot(kernels, plain, x, stop=131), dot(kernels, moved, x, stop=131))
    y = normal((2, 65), seed=3)
    assert same_bits(accumulate(kernels, plain, coef, y), accumulate(kernels, moved, coef, y))


@pytest.mark.parametrize("weight_type", TYPES)
@pytest.mark.parametrize("name", NATIVE)
def test_threads_change_nothing(name, weight_type):
    plane = MemoryPlane(normal((300, 416)), weight_type)
    x, coef = normal((27, 416), seed=1), normal((27, 300), seed=2)
    y = normal((27, 416), seed=3)
    results = []
    for n_threads in (1, 2, 3, 5):
        ks = choose_kernels(name, n_threads=n_threads)
        for _ in range(3):
            results.append((dot(ks, plane, x, stop=300), accumulate(ks, plane, coef, y)))
        ks.close()
    for dots, sums in results[1:]:
        assert same_bits(dots, results[0][0]) and same_bits(sums, results[0][1])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("weight_type", TYPES)
def test_accumulate_agrees_with_reference(kernels, reference, weight_type, n):
    plane = MemoryPlane(normal((37, n), seed=n), weight_type)
    coef, y = normal((3, 37), seed=1), normal((3, n), seed=2)
    ours, oracle = (accumulate(ks, plane, coef, y) for ks in (kernels, reference))
    partial = np.abs(y) + np.abs(coef) @ np.abs(plane.rows)
    assert (np.abs(ours - oracle) <= partial * 2.0**-22 * 38).all()
    exact = y + coef.astype(np.float64) @ plane.rows
    assert (np.abs(oracle - exact) <= partial * 2.0**-22 * 38).all()


@pytest.mark.parametrize("n", [33, 100, 384])
@pytest.mark.parametrize("weight_type", TYPES)
def test_accumulate_is_one_sum_however_it_is_divided(kernels, weight_type, n):
    plane = MemoryPlane(normal((150, n)), weight_type, per_frame=7)
    coef, y = normal((17, 150), seed=1), normal((17, n), seed=2)
    whole = accumulate(kernels, plane, coef, y)
    ids = np.arange(150, dtype=np.int32)
    assert same_bits(accumulate(kernels, plane, coef, y, ids=ids), whole)
    for n_tokens in (1, 2, 3, 5, 8, 11):
        assert same_bits(
            accumulate(kernels, plane, coef[:n_tokens], y[:n_tokens]), whole[:n_tokens]
        )
    part = y
    for start, stop in [(0, 1), (1, 66), (66, 149), (149, 150)]:
        piece = np.ascontiguousarray(coef[:, start:stop])
        part = accumulate(kernels, plane, piece, part, start=start)
    assert same_bits(part, whole)


@pytest.mark.parametrize("weight_type", TYPES)
def test_coefficients_of_zero_change_nothing(kernels, weight_type):
    """A chunk computes the union of its tokens' ids: the other tokens' items carry zeros."""
    plane = MemoryPlane(normal((150, 70)), weight_type)
    coef = np.maximum(normal((4, 150), seed=1), 0)
    y = np.zeros((4, 70), dtype=np.float32)
    union = accumulate(kernels, plane, coef, y)
    for t in range(4):
        ids = np.flatnonzero(coef[t]).astype(np.int32)
        own = accumulate(kernels, plane, coef[t : t + 1, ids], y[:1], ids=ids)
        assert same_bits(own[0], union[t])


def test_a_sum_never_ends_in_minus_zero(kernels):
    """-1e-60 rounds to -0; another token's item, added with coefficient 0, would make it +0."""
    plane = MemoryPlane(np.array([[-1e-30] * 33, [1.0] * 33], dtype=np.float32), "f32")
    coef, y = np.array([[1e-30, 0]], dtype=np.float32), np.zeros((1, 33), dtype=np.float32)
    both = accumulate(kernels, plane, coef, y)
    alone = accumulate(kernels, plane, coef[:, :1].copy(), y)
    assert same_bits(both, alone) and not np.signbit(alone).any()


@pytest.mark.parametrize("weight_type", TYPES)
def test_wider_outputs_and_coefficients_are_left_alone(kernels, weight_type):
    plane = MemoryPlane(normal((10, 40)), weight_type)
    coef, y = normal((2, 16), seed=1), normal((2, 48), seed=2)
    wide = accumulate(kernels, plane, coef, y, ids=np.arange(10, dtype=np.int32))
    exact = accumulate(kernels, plane, coef[:, :10].copy(), y[:, :40].copy())
    assert same_bits(wide[:, :40].copy(), exact)
    assert same_bits(wide[:, 40:].copy(), y[:, 40:].copy())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("weight_type", TYPES)
def test_decoded_rows_are_quants_bits(kernels, weight_type, n):
    plane = MemoryPlane(normal((9, n)) * 1e-3, weight_type)
    ids = np.array([8, 0, 3, 3], dtype=np.int32)
    out = np.empty((4, n), dtype=np.float32)
    kernels.decode_rows(plane.addresses, plane.piece, ids, out)
    assert same_bits(out, plane.rows[ids])


@pytest.mark.parametrize("factor", [0.0, 1e-38, 1e-30, 1e-6, 1e3])
@pytest.mark.parametrize("weight_type", TYPES)
def test_zero_tiny_and_huge_rows_and_activations(kernels, reference, weight_type, factor):
    rows = normal((8, 96)) * np.float32(factor)
    rows[3] = 0
    plane = MemoryPlane(rows, weight_type)
    for x_factor in (0.0, 1e-40, 1e-28, 1.0, 1e30):
        x = normal((2, 96), seed=1) * np.float32(x_factor)
        ours, oracle = (dot(ks, plane, x, stop=8) for ks in (kernels, reference))
        assert np.isfinite(ours).all() and (ours[:, 3] == 0).all()
        assert (np.abs(ours - oracle) <= dot_terms(plane, x) * 2.0**-20 + 1e-36).all()


@pytest.mark.parametrize("name", NATIVE)
def test_quantised_activations_are_the_references_bits(name):
    ks = choose_kernels(name, n_threads=1)
    plane = MemoryPlane(np.eye(100, dtype=np.float32), "int8")
    x = normal((3, 100)) * np.array([[1e-33], [1], [1e20]], dtype=np.float32)
    x[1, :5] = [2.5, -2.5, 0.5, 127, 1.5]  # halves, to even
    got = dot(ks, plane, x, stop=100)
    one = plane.rows[0, 0]
    for t in range(3):
        q, scales = quantise(x[t])
        levels = q.astype(np.float32)
        expected = (levels * np.float32(127)) * (one / np.float32(127) * scales)[:, None]
        assert np.allclose(got[t], expected.reshape(-1)[:100], rtol=1e-6, atol=0)
    assert quantise(x[1])[0][0, :5].tolist() == [2, -2, 0, 127, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("weight_type", TYPES)
def test_broken_activations_show(kernels, weight_type, bad):
    plane = MemoryPlane(np.abs(normal((6, 70))) + 0.1, weight_type)
    x = normal((2, 70), seed=1)
    clean = dot(kernels, plane, x, stop=6)
    x[1, 50] = bad
    out = dot(kernels, plane, x, stop=6)
    assert same_bits(out[0], clean[0])
    assert not np.isfinite(out[1]).any()


def test_absent_frames_are_an_error(kernels):
    plane = MemoryPlane(normal((12, 40)), "int8", per_frame=4, skip={1})
    x = normal((1, 40))
    dot(kernels, plane, x, stop=4)
    dot(kernels, plane, x, ids=np.array([0, 3, 8, 11], dtype=np.int32))
    y = np.zeros((1, 40), dtype=np.float32)
    with pytest.raises(KernelError, match="absent"):
        dot(kernels, plane, x, stop=5)
    with pytest.raises(KernelError, match="absent"):
        dot(kernels, plane, x, ids=np.array([0, 7], dtype=np.int32))
    with pytest.raises(KernelError, match="absent"):
        accumulate(kernels, plane, normal((1, 12)), y)
    with pytest.raises(KernelError, match="absent"):
        kernels.decode_rows(plane.addresses, plane.piece, np.array([4], dtype=np.int32), y)


@pytest.mark.parametrize(
    "ids, match",
    [([0, 12], "outside"), ([-1, 0], "outside"), ([3, 3], "ascend"), ([5, 2], "ascend"),
     ([2**31 - 1], "outside")],
)  # fmt: skip
def test_ids_out_of_order_or_range_are_errors(kernels, ids, match):
    plane = MemoryPlane(normal((12, 40)), "f16", per_frame=4)
    ids = np.array(ids, dtype=np.int32)
    with pytest.raises(KernelError, match=match):
        dot(kernels, plane, normal((1, 40)), ids=ids)
    with pytest.raises(KernelError, match=match):
        accumulate(kernels, plane, normal((1, len(ids))), np.zeros((1, 40), np.float32), ids=ids)


def test_misaligned_frames_are_an_error(kernels):
    plane = MemoryPlane(normal((4, 40)), "f32")
    plane.addresses += np.uint64(4)
    with pytest.raises(KernelError, match="multiple of 16"):
        dot(kernels, plane, normal((1, 40)), stop=4)


def test_wrong_shapes_are_named_before_anything_is_touched(kernels):
    plane = MemoryPlane(normal((12, 40)), "int8")
    acts = kernels.activations(2, 40)
    x, piece, addresses = normal((2, 40)), plane.piece, plane.addresses
    out = np.zeros((2, 12), dtype=np.float32)
    for bad, match in [
        (x.astype(np.float64), "x must be float32"),
        (normal((2, 39)), "x must have shape"),
        (normal((2, 80))[:, ::2], "C-contiguous"),
        (normal((3, 40)), "does not fit"),
        (x[:0], "does not fit"),
    ]:
        with pytest.raises(UsageError, match=match):
            kernels.prepare(acts, bad, piece)
    with pytest.raises(UsageError, match="not prepared"):
        kernels.dot_range(acts, addresses, piece, 0, 12, out)
    kernels.prepare(acts, x, piece)
    for arguments, match in [
        ((addresses.astype(np.int64), piece, 0, 12, out), "addresses must be uint64"),
        ((addresses, piece, 0, 13, out), "not in the plane"),
        ((addresses, piece, 5, 4, out), "not in the plane"),
        ((addresses, piece, 0, 12, out[:, :11].copy()), "at least 12"),
        ((addresses, piece, 0, 12, out[:1]), "out must have shape"),
        ((addresses, piece, 0, 12, np.broadcast_to(out[:1, :1], (2, 12))), "C-contiguous"),
    ]:
        with pytest.raises(UsageError, match=match):
            kernels.dot_range(acts, *arguments)
    with pytest.raises(UsageError, match="ids must be int32"):
        kernels.dot_ids(acts, addresses, piece, np.arange(3), out)
    frozen = out.copy()
    frozen.flags.writeable = False
    with pytest.raises(UsageError, match="read-only"):
        kernels.dot_range(acts, addresses, piece, 0, 12, frozen)
    with pytest.raises(UsageError, match="y must have at least 40"):
        kernels.accumulate_range(normal((2, 12)), addresses, piece, 0, 12, normal((2, 39)))


@pytest.mark.parametrize(
    "fields",
    [(3, 0, 64, 0, 32), (3, 1, 40, 0, 32), (3, 1, 48, 16, 32), (3, 1, 64, 8, 32), (3, 1, 64, 0, 0),
     (3, 1, 64, -16, 32)],
)  # fmt: skip
def test_impossible_pieces_are_refused(fields):
    with pytest.raises(UsageError, match="is not a piece"):
        PieceView(*fields)
    PieceView(3, 1, 48, 0, 32)


def test_activation_bytes_are_what_is_held(kernels):
    acts = kernels.activations(7, 100)
    assert acts.n_bytes == kernels.activation_bytes(7, 100) == 7 * (128 + 4 * 16)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NATIVE),
    weight_type=st.sampled_from(TYPES),
    n=st.integers(1, 300),
    n_items=st.integers(1, 40),
    n_tokens=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_any_shape_agrees_with_reference(name, weight_type, n, n_items, n_tokens, seed):
    ks, oracle = choose_kernels(name, n_threads=1), choose_kernels("reference")
    plane = MemoryPlane(normal((n_items, n), seed=seed), weight_type, per_frame=1 + seed % 5)
    x, coef = normal((n_tokens, n), seed=seed + 1), normal((n_tokens, n_items), seed=seed + 2)
    difference = np.abs(dot(ks, plane, x, stop=n_items) - dot(oracle, plane, x, stop=n_items))
    assert (difference <= dot_terms(plane, x) * 2.0**-20 + 1e-30).all()
    y = np.zeros((n_tokens, n), dtype=np.float32)
    difference = np.abs(accumulate(ks, plane, coef, y) - accumulate(oracle, plane, coef, y))
    room = np.abs(coef) @ np.abs(plane.rows) * 2.0**-22 * (n_items + 1)
    assert (difference <= room).all()
