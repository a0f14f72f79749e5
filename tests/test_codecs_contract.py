"""The codec contract, run over the whole table."""

from __future__ import annotations

import numpy as np
import pytest

from flashllm import _core
from flashllm.codecs import CODECS
from flashllm.codecs.planes import join16, split16
from flashllm.errors import CodecError, UnknownNameError


def _frames() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal(16384) * 0.03).astype(np.float32)
    return {
        "zeros": bytes(4096),
        "noise": rng.bytes(4096),
        "bf16": (weights.view(np.uint32) >> 16).astype("<u2").tobytes(),
        "f16": weights.astype("<f2").tobytes(),
        "f32": weights.tobytes(),
        "two bytes": b"ab",
        "one byte": b"a",
        "odd": b"abcdefg" * 99,
    }


FRAMES = _frames()
cases = pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
codecs = pytest.mark.parametrize("name", list(CODECS))


@codecs
@cases
def test_round_trip(name, frame):
    stored = CODECS[name].encode(frame)
    out = bytearray(b"\xaa" * len(frame))
    CODECS[name].decode_into(stored, out)
    assert len(stored) <= len(frame)
    assert out == frame


@codecs
def test_one_decoder_serves_many_frames(name):
    encoder, decoder = CODECS[name].encoder(), CODECS[name].decoder()
    for frame in list(FRAMES.values()) * 2:
        out = np.empty(len(frame), np.uint8)
        decoder.decode_into(encoder.encode(frame), memoryview(out))
        assert out.tobytes() == frame


@codecs
@cases
def test_any_other_length_of_stored_is_an_error(name, frame):
    stored = bytes(CODECS[name].encode(frame))
    lengths = {0, 1, len(stored) // 2, len(stored) - 1, len(stored) + 1, len(frame) + 1}
    for length in sorted(lengths - {len(stored), len(frame)}):
        damaged = (stored + bytes(length))[:length]
        with pytest.raises(CodecError):
            CODECS[name].decode_into(damaged, bytearray(len(frame)))


@codecs
@cases
def test_any_other_size_of_out_is_an_error(name, frame):
    stored = bytes(CODECS[name].encode(frame))
    for size in {len(frame) - 1, len(frame) + 1, 2 * len(frame)} - {len(stored)}:
        with pytest.raises(CodecError):
            CODECS[name].decode_into(stored, bytearray(size))


@codecs
def test_nothing_is_written_beside_out(name):
    frame = FRAMES["bf16"]
    arena = np.full(len(frame) + 32, 7, np.uint8)
    CODECS[name].decode_into(CODECS[name].encode(frame), memoryview(arena)[16:-16])
    assert (arena[:16] == 7).all() and (arena[-16:] == 7).all()
    assert arena[16:-16].tobytes() == frame


@codecs
def test_read_only_out_is_refused(name):
    with pytest.raises(TypeError):
        CODECS[name].decode_into(CODECS[name].encode(bytes(64)), bytes(64))


@codecs
def test_encoding_is_deterministic(name):
    for frame in FRAMES.values():
        assert bytes(CODECS[name].encode(frame)) == bytes(CODECS[name].encode(bytearray(frame)))


def test_unknown_codec_lists_the_known():
    with pytest.raises(UnknownNameError, match="'lz9'.*raw.*zstd"):
        CODECS["lz9"]


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 31, 32, 33, 1000])
def test_compiled_planes_equal_numpy(n):
    values = np.random.default_rng(n).integers(0, 2**16, n).astype("<u2")
    high, low = np.empty(n, np.uint8), np.empty(n, np.uint8)
    _core.planes_split16(values.view(np.uint8), high, low)
    true_high, true_low = split16(values)
    np.testing.assert_array_equal(high, true_high)
    np.testing.assert_array_equal(low, true_low)
    back = np.empty(2 * n, np.uint8)
    _core.planes_join16(high, low, back)
    np.testing.assert_array_equal(back.view("<u2"), values)
    np.testing.assert_array_equal(join16(high, low), values)


def test_compiled_planes_refuse_other_lengths():
    with pytest.raises(ValueError):
        _core.planes_split16(bytes(9), bytearray(4), bytearray(4))
    with pytest.raises(ValueError):
        _core.planes_join16(bytes(4), bytes(5), bytearray(8))


def test_high_plane_of_bf16_is_the_exponent():
    values = np.array([1.0, -1.0, 2.0, -0.5], np.float32)
    high, low = split16((values.view(np.uint32) >> 16).astype(np.uint16))
    assert high.tolist() == [127, 127, 128, 126]
    assert low.tolist() == [0, 1, 0, 1]


def test_planes_beat_zstd_on_bf16():
    frame = FRAMES["bf16"]
    planes = len(frame) / len(CODECS["planes"].encode(frame))
    assert planes >= 1.4 and planes > 1.1 * len(frame) / len(CODECS["zstd"].encode(frame))
