"""add_neurons, every set x weight type: the bits of dot, activate and accumulate in a row."""

from __future__ import annotations

import numpy as np
import pytest

from flashllm.errors import KernelError, UnknownNameError, UsageError
from flashllm.kernels import PieceView, choose_kernels
from flashllm.kernels.base import KernelSet
from flashllm.quant import WEIGHT_TYPES
from flashllm.units import align_up

from .kernel_planes import AVAILABLE, TYPES, normal, same_bits

# Wide enough that bundles make many groups (of 128 KiB), and not a multiple of 32.
N_ITEMS, N_COLS = 61, 4100
SHAPES = {
    "gated": (True, True), "ungated": (True, False), "decided and gated": (False, True),
    "decided": (False, False),
}  # fmt: skip


class Bundles:
    """gate | up | down of every item, in frames of their own, in scattered order."""

    def __init__(self, types, *, n_items=N_ITEMS, n_cols=N_COLS, per_frame=3, seed=0):
        raw = [
            WEIGHT_TYPES[kind].encode(normal((n_items, n_cols), seed + i))
            for i, kind in enumerate(types)
        ]
        offsets, stride = [], 0
        for rows in raw:
            offsets.append(stride)
            stride += align_up(rows.shape[1], 16)
        self.pieces = tuple(
            PieceView(WEIGHT_TYPES[kind].code, per_frame, stride, at, n_cols)
            for kind, at in zip(types, offsets, strict=True)
        )
        n_frames = -(-n_items // per_frame)
        self.addresses = np.zeros(n_frames, np.uint64)
        self._buffers = []
        for frame in np.random.default_rng(seed).permutation(n_frames):
            buffer = np.full(per_frame * stride + 32, 0xFF, np.uint8)
            start = -buffer.ctypes.data % 16
            for item in range(frame * per_frame, min((frame + 1) * per_frame, n_items)):
                for rows, at in zip(raw, offsets, strict=True):
                    to = start + (item - frame * per_frame) * stride + at
                    buffer[to : to + rows.shape[1]] = rows[item]
            self.addresses[frame] = buffer.ctypes.data + start
            self._buffers.append(buffer)


@pytest.fixture(scope="module", params=AVAILABLE)
def kernels(request):
    ks = choose_kernels(request.param, n_threads=3)
    yield ks
    ks.close()


def ask(ks, bundles, shape, items, *, kind="silu", call=None, x=None):
    """(y, factors) of one token, y begun with values of its own."""
    has_first, has_second = SHAPES[shape]
    first, second, down = bundles.pieces
    pieces = (first if has_first else None, second if has_second else None, down)
    acts = ks.activations(1, N_COLS)
    ks.prepare(acts, normal((1, N_COLS), 7) if x is None else x, first)
    n = len(items)
    pre = np.full((1, n), np.nan, np.float32) if has_first else normal((1, n), 8)
    up = np.full((1, n), np.nan, np.float32) if has_second else None
    y = normal((1, N_COLS), 9)
    (call or ks.add_neurons)(acts, bundles.addresses, pieces, items, kind, pre, up, y)
    return y, pre


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_type", TYPES)
def test_the_bits_of_the_operators_in_a_row(kernels, weight_type, shape):
    bundles = Bundles([weight_type] * 3)

    def slow(*arguments):
        KernelSet._neurons(kernels, *arguments)

    some = np.array([0, 1, 2, 5, 17, 18, 40, 59, 60], np.int32)
    for items in (range(0, N_ITEMS), range(4, 50), range(7, 8), some):
        fast, slowly = (ask(kernels, bundles, shape, items, call=call) for call in (None, slow))
        assert same_bits(fast[0], slowly[0]) and same_bits(fast[1], slowly[1])


@pytest.mark.parametrize("types", [("int8", "int4", "f16"), ("f32", "bf16", "int8")])
def test_pieces_of_different_types(kernels, types):
    bundles = Bundles(types)
    whole = ask(kernels, bundles, "gated", range(0, N_ITEMS))
    parts = ask(kernels, bundles, "gated", np.arange(N_ITEMS, dtype=np.int32))
    assert same_bits(whole[0], parts[0])
    by_hand = ask(
        kernels, bundles, "gated", range(0, N_ITEMS),
        call=lambda *arguments: KernelSet._neurons(kernels, *arguments),
    )  # fmt: skip
    assert same_bits(whole[0], by_hand[0])


# Up to six threads take turns in adding; more work operator by operator.
@pytest.mark.parametrize("n_threads", [2, 6, 8])
@pytest.mark.parametrize("weight_type", ["int8", "f32"])
def test_threads_change_nothing(kernels, weight_type, n_threads):
    bundles = Bundles([weight_type] * 3)
    answers = []
    for n in (1, n_threads):
        ks = choose_kernels(kernels.name, n_threads=n)
        answers += [ask(ks, bundles, "gated", range(0, N_ITEMS))[0] for _ in range(5)]
        ks.close()
    assert all(same_bits(answer, answers[0]) for answer in answers)


def test_nothing_to_add(kernels):
    bundles = Bundles(["int8"] * 3)
    y, _ = ask(kernels, bundles, "decided", range(3, 3))
    assert same_bits(y, normal((1, N_COLS), 9))


def test_an_absent_frame_is_an_error(kernels):
    bundles = Bundles(["int8"] * 3)
    bundles.addresses[5] = 0
    ask(kernels, bundles, "gated", range(0, 15))
    for shape in SHAPES:
        with pytest.raises(KernelError):
            ask(kernels, bundles, shape, range(0, 16))


def test_refusals(kernels):
    bundles = Bundles(["int8"] * 3)
    with pytest.raises(UnknownNameError):
        ask(kernels, bundles, "gated", range(0, 4), kind="step")
    with pytest.raises(UsageError, match="step"):
        ask(kernels, bundles, "gated", range(0, 8, 2))
    with pytest.raises(UsageError, match="items"):
        ask(kernels, bundles, "gated", range(60, 64))
    with pytest.raises(UsageError, match="items"):
        ask(kernels, bundles, "gated", np.arange(4))
    with pytest.raises(KernelError):
        ask(kernels, bundles, "gated", np.array([3, 3], np.int32))
    with pytest.raises(UsageError, match="prepared"):
        acts = kernels.activations(1, N_COLS)
        first, second, down = bundles.pieces
        pre = np.zeros((1, 4), np.float32)
        kernels.add_neurons(
            acts, bundles.addresses, (first, None, down), range(0, 4), "silu", pre, None,
            np.zeros((1, N_COLS), np.float32),
        )  # fmt: skip


SOME = np.array([0, 1, 2, 5, 17, 18, 40, 59, 60], np.int32)


def decide(
    ks, bundles, *, decides, gated, bias, ids=SOME, n_room=None, kind="relu2", call=None, count=None
):
    """(y, decided, how many were added) of one token."""
    first, second, down = bundles.pieces
    acts = ks.activations(1, N_COLS)
    ks.prepare(acts, normal((1, N_COLS), 7), first)
    decided, y = normal((1, N_ITEMS), 8), normal((1, N_COLS), 9)
    n = max(1, len(ids)) if n_room is None else n_room
    room = np.empty((1, n), np.float32), np.empty((1, n), np.float32), np.empty(n, np.int32)
    added = np.full(1, -1, np.int64)
    (call or ks.add_decided)(
        acts, bundles.addresses, (first if decides else None, second if gated else None, down), ids,
        kind, decided, normal((N_ITEMS,), 6) * 30 if bias else None,
        (room[0], room[1] if gated else None, room[2]), y, added, count=count,
    )  # fmt: skip
    return y, decided, int(added[0])


@pytest.mark.parametrize("decides, bias", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("weight_type", ["int8", "int4", "bf16"])
def test_decided_neurons_in_one_call(kernels, weight_type, gated, decides, bias):
    bundles = Bundles([weight_type] * 3)
    how = {"decides": decides, "gated": gated, "bias": bias}

    def slow(acts, addresses, pieces, ids, kind, decided, bias, room, y, added, count):
        added[0] = 0
        KernelSet._add_decided(
            kernels, acts, addresses, pieces, ids, count, kind, decided, bias, *room, y, added
        )

    for ids in (SOME, np.arange(N_ITEMS, dtype=np.int32), SOME[:1]):
        both = (decide(kernels, bundles, ids=ids, call=call, **how) for call in (None, slow))
        fast, slowly = both
        assert same_bits(fast[0], slowly[0]) and same_bits(fast[1], slowly[1])
        assert fast[2] == slowly[2]
        if decides:
            assert fast[2] == (fast[1][0, ids] > 0).sum() and (len(ids) < 9 or fast[2] < len(ids))
        else:
            assert fast[2] == len(ids)
        for n in (0, 1, len(ids)):  # of which the first n are meant
            counted = decide(kernels, bundles, ids=ids, count=np.array([n]), **how)
            listed = decide(kernels, bundles, ids=ids[:n], **how)
            assert same_bits(counted[0], listed[0]) and counted[2] == listed[2]
    nothing = decide(kernels, bundles, ids=SOME[:0], **how)
    assert nothing[2] == 0 and same_bits(nothing[0], normal((1, N_COLS), 9))


def test_what_add_decided_refuses(kernels):
    bundles, how = Bundles(["int8"] * 3), {"decides": True, "gated": True, "bias": True}
    for bad in ([3, 3], [-1, 4], [5, N_ITEMS], [5, 2**31 - 1]):
        for decides in (True, False):
            with pytest.raises(KernelError):
                decide(kernels, bundles, **{**how, "decides": decides}, ids=np.array(bad, np.int32))
    with pytest.raises(UsageError, match="room|columns"):
        decide(kernels, bundles, **how, n_room=len(SOME) - 1)
    with pytest.raises(UsageError, match="ids"):
        decide(kernels, bundles, **how, ids=SOME.astype(np.int64))
    for n in (-1, len(SOME) + 1):
        with pytest.raises(KernelError):
            decide(kernels, bundles, **how, count=np.array([n]))
    with pytest.raises(UsageError, match="count"):
        decide(kernels, bundles, **how, count=np.array([1], np.int32))
    with pytest.raises(UnknownNameError):
        decide(kernels, bundles, **how, kind="step")
    bundles.addresses[SOME[-1] // 3] = 0
    for decides in (True, False):
        with pytest.raises(KernelError):
            decide(kernels, bundles, **{**how, "decides": decides}, kind="silu")


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("cut", ["zero", "each", "infinite"])
def test_above(kernels, n, cut):
    values, limits = normal((1, n), 3), None
    values[0, ::3] = 0.0
    if cut != "zero":
        limits = normal((n,), 4)
        limits[::5] = values[0, ::5]  # an equal value is not above
        if cut == "infinite":
            limits[1::5], limits[2::5] = np.inf, -np.inf
    ids, count = np.full(n, -7, np.int32), np.full(1, -7, np.int64)
    kernels.above(values, limits, ids, count)
    truth = np.flatnonzero(values[0] > (0 if limits is None else limits))
    assert count[0] == len(truth) and np.array_equal(ids[: len(truth)], truth)


def test_what_above_refuses(kernels):
    values, ids, count = normal((1, 8), 3), np.zeros(8, np.int32), np.zeros(1, np.int64)
    for bad in (
        (values.astype(np.float64), None, ids, count), (values, normal((7,), 1), ids, count),
        (values, None, ids[:7], count), (values, None, ids, np.zeros(2, np.int64)),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            kernels.above(*bad)
