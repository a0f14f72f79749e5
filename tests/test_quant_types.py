"""Every weight type: geometry, stated error, refusals, golden bytes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashllm.errors import UnknownNameError, UsageError, WeightValueError
from flashllm.quant import BY_CODE, WEIGHT_TYPES

TYPES = WEIGHT_TYPES.names()
SIZES = [1, 31, 32, 33, 63, 64, 65, 100, 128, 384]
GOLDEN = Path(__file__).parent / "golden"


def rows_of(n, r=5, seed=0):
    return np.random.default_rng(seed).standard_normal((r, n)).astype(np.float32)


def golden_rows():
    """Values without a random generator behind them: every level, both signs, zeros, extremes."""
    ramp = np.arange(-50, 50, dtype=np.float32) / 7
    rows = np.stack([ramp, ramp[::-1] * 1e-3, np.zeros(100, np.float32), ramp * ramp * 11])
    rows[3, 40] = 6e4
    return rows.astype(np.float32)


def test_codes_are_the_c_enum():
    assert {t.name: c for c, t in BY_CODE.items()} == {
        "f32": 0, "f16": 1, "bf16": 2, "int8": 3, "int4": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, n, expected",
    [("f32", 33, 132), ("f16", 33, 66), ("bf16", 33, 66), ("int8", 32, 34), ("int8", 33, 68),
     ("int4", 32, 18), ("int4", 33, 36)],
)  # fmt: skip
def test_row_bytes(name, n, expected):
    assert WEIGHT_TYPES[name].row_bytes(n) == expected


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", TYPES)
def test_round_trip_within_the_stated_error(name, n):
    kind, rows = WEIGHT_TYPES[name], rows_of(n)
    rows[1] = 0
    rows[2] *= 1e-6
    rows[3] *= 1e3
    raw = kind.encode(rows)
    assert raw.shape == (5, kind.row_bytes(n)) and raw.dtype == np.uint8
    back = kind.decode(raw, n)
    assert back.dtype == np.float32 and back.flags.c_contiguous
    bound = kind.error_bound(rows)
    assert bound.shape == rows.shape
    assert (np.abs(back - rows) <= bound).all()
    assert (back[1] == 0).all()


@pytest.mark.parametrize("name", TYPES)
def test_the_stated_error_is_not_generous(name):
    kind, rows = WEIGHT_TYPES[name], rows_of(4096)
    worst = np.abs(kind.decode(kind.encode(rows), 4096) - rows).max(axis=1)
    assert (kind.error_bound(rows).max(axis=1) <= 2.1 * worst).all()


@pytest.mark.parametrize("name", TYPES)
def test_encoding_decoded_rows_changes_nothing(name):
    kind = WEIGHT_TYPES[name]
    if name == "int4":
        pytest.skip("another scale may fit the quantised values as well")
    once = kind.encode(rows_of(100))
    twice = kind.encode(kind.decode(once, 100))
    assert np.array_equal(kind.decode(once, 100), kind.decode(twice, 100))


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_independent(name):
    kind, rows = WEIGHT_TYPES[name], rows_of(100, r=7)
    whole = kind.encode(rows)
    for r in range(7):
        assert np.array_equal(kind.encode(rows[r : r + 1])[0], whole[r])


@pytest.mark.parametrize("name", TYPES)
def test_no_rows_are_rows(name):
    kind = WEIGHT_TYPES[name]
    assert kind.encode(rows_of(40, r=0)).shape == (0, kind.row_bytes(40))
    assert kind.decode(np.empty((0, kind.row_bytes(40)), np.uint8), 40).shape == (0, 40)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", TYPES)
def test_values_that_are_not_finite_are_named(name, bad):
    rows = rows_of(40)
    rows[2, 33] = bad
    with pytest.raises(WeightValueError, match="row 2, column 33") as caught:
        WEIGHT_TYPES[name].encode(rows)
    assert (caught.value.row, caught.value.column) == (2, 33)


@pytest.mark.parametrize(
    "name, largest, too_big",
    [("f16", 65504.0, 65520.0), ("bf16", 3.3895314e38, 3.4e38), ("int8", 8319008.0, 8.4e6),
     ("int4", 458528.0, 4.6e5)],
)  # fmt: skip
def test_overflow_is_an_error_and_the_limit_is_not(name, largest, too_big):
    kind = WEIGHT_TYPES[name]
    rows = np.zeros((1, 40), dtype=np.float32)
    rows[0, 35] = largest
    back = kind.decode(kind.encode(rows), 40)
    assert np.isfinite(back).all() and abs(back[0, 35] - largest) <= largest * 0.13
    rows[0, 35] = -too_big
    with pytest.raises(WeightValueError, match="row 0, column 35"):
        kind.encode(rows)


def test_bf16_rounds_to_nearest_even():
    bits = np.array([[0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF]], dtype=np.uint32)
    raw = WEIGHT_TYPES["bf16"].encode(bits.view(np.float32))
    assert raw.view("<u2").tolist() == [[0x3F80, 0x3F82, 0x3F81, 0x3F80]]


def test_int8_levels_and_layout():
    rows = np.zeros((1, 33), dtype=np.float32)
    rows[0, :3], rows[0, 32] = [127, -127, 64], -254
    raw = WEIGHT_TYPES["int8"].encode(rows)[0]
    assert raw[:3].view(np.int8).tolist() == [127, -127, 64]
    assert raw[32:64].view(np.int8).tolist() == [-127] + [0] * 31
    assert raw[64:].view("<f2").tolist() == [1.0, 2.0]


def test_int4_levels_and_layout():
    rows = np.zeros((1, 32), dtype=np.float32)
    rows[0, 0], rows[0, 1], rows[0, 16] = -8, 7, 3
    raw = WEIGHT_TYPES["int4"].encode(rows)[0]
    assert raw[16:].view("<f2").tolist() == [1.0]
    assert raw[:3].tolist() == [0 | (3 + 8) << 4, 15 | 8 << 4, 8 | 8 << 4]


def test_int4_fit_is_at_least_as_good_as_the_first_candidate():
    rows = rows_of(4096, r=16)
    kind = WEIGHT_TYPES["int4"]
    fitted = np.square(kind.decode(kind.encode(rows), 4096) - rows).sum()
    x = rows.reshape(16, -1, 32)
    m = np.take_along_axis(x, np.abs(x).argmax(2)[:, :, None], axis=2)
    scale = (m / -8).astype(np.float16).astype(np.float32)
    simple = np.square(np.clip(np.rint(x / scale), -8, 7) * scale - x).sum()
    assert fitted < 0.95 * simple


@pytest.mark.parametrize("name", TYPES)
def test_golden_bytes(name):
    raw = WEIGHT_TYPES[name].encode(golden_rows())
    assert raw.tobytes() == (GOLDEN / f"quant_{name}.bin").read_bytes()


@pytest.mark.parametrize("name", TYPES)
def test_wrong_arguments_are_named(name):
    kind = WEIGHT_TYPES[name]
    with pytest.raises(UsageError, match="rows must be"):
        kind.encode(np.zeros(4, dtype=np.float32))
    with pytest.raises(UsageError, match="need uint8"):
        kind.decode(np.zeros((1, 5), dtype=np.uint8), 100)


def test_unknown_name_lists_the_known():
    with pytest.raises(UnknownNameError, match="int3.*known: bf16, f16, f32, int4, int8"):
        WEIGHT_TYPES["int3"]


finite = st.floats(-1e5, 1e5, width=32)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["int8", "int4", "bf16"]), st.lists(finite, min_size=1, max_size=70))
def test_any_finite_row_stays_within_its_bound(name, values):
    kind, rows = WEIGHT_TYPES[name], np.array([values], dtype=np.float32)
    back = kind.decode(kind.encode(rows), len(values))
    assert (np.abs(back - rows) <= kind.error_bound(rows)).all()
