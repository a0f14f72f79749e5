"""rwkv.cpp files: what is read is what was written, and nothing hostile is believed."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from flashllm.checkpoints import open_checkpoint
from flashllm.checkpoints.rwkv_blocks import BLOCK_TYPES
from flashllm.conversion.resolve import resolve
from flashllm.errors import CheckpointError, FlashError, UnsupportedError

from . import cheap
from .rwkv_models import VERSIONS, VOCAB, N, exported, header, official, record, written


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_tensors_come_back(tmp_path, version, half):
    tensors = exported(official(version), version)
    with open_checkpoint(written(tmp_path / "m.bin", tensors, half=half)) as found:
        assert found.kind == "rwkv.cpp"
        assert resolve(found).config.version == version
        for name, a in tensors.items():
            if name.endswith("time_maa_w2"):
                parts = [found.rows(f"{name}.{x}", 0, a.shape[1]) for x in "wkvrg"]
                np.testing.assert_array_equal(np.stack(parts), a)
                continue
            shape = found.shape(name)
            values = found.rows(name, 0, shape[0])
            expected = a.reshape(shape)
            if found.dtype(name) == "f16":
                expected = expected.astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(values, expected)
            part = found.rows(name, shape[0] // 3, shape[0] - 1)
            np.testing.assert_array_equal(part, expected[shape[0] // 3 : -1])


def quantised(code: int, blocks: int, seed: int) -> tuple[bytes, np.ndarray]:
    """Random blocks of a type, and their values worked out one at a time."""
    rng = np.random.default_rng(seed)
    data, values = b"", []
    for _ in range(blocks):
        d, m = (np.float16(x) for x in rng.uniform(0.01, 1, 2))
        levels = rng.integers(0, {2: 16, 3: 16, 7: 32, 8: 32, 9: 256}[code], 32)
        if code == 9:
            data += d.tobytes() + (levels - 128).astype(np.int8).tobytes()
            values += [float(d) * (int(q) - 128) for q in levels]
            continue
        data += d.tobytes() + (m.tobytes() if code in (3, 8) else b"")
        if code in (7, 8):
            data += struct.pack("<I", sum(int(q >> 4) << j for j, q in enumerate(levels)))
        data += bytes(int(levels[j] & 15) | int(levels[j + 16] & 15) << 4 for j in range(16))
        for q in map(int, levels):
            offset = {2: -8 * float(d), 7: -16 * float(d)}.get(code, float(m))
            values.append(q * float(d) + offset)
    return data, np.array(values, np.float64)


@pytest.mark.parametrize("code", sorted(BLOCK_TYPES))
def test_blocks_decode_to_their_values(tmp_path, code):
    tensors = exported(official("5.2"), "5.2")
    name = "blocks.1.att.key.weight"
    data, expected = quantised(code, N * N // 32, code)
    parts = [header(code)]
    for key, a in tensors.items():
        parts.append(record(key, a, *((code, data) if key == name else (0, a.tobytes()))))
    (tmp_path / "m.bin").write_bytes(b"".join(parts))
    with open_checkpoint(tmp_path / "m.bin") as found:
        assert found.dtype(name) == "f32"
        np.testing.assert_allclose(found.rows(name, 0, N).ravel(), expected, rtol=1e-6, atol=1e-6)
        middle = found.rows(name, 5, 9)
        np.testing.assert_array_equal(middle, found.rows(name, 0, N)[5:9])
        resolve(found)


def test_blocks_where_the_shape_is_flattened(tmp_path):
    tensors = exported(official("7"), "7")
    name = "blocks.1.att.x_rwkvag"
    data, expected = quantised(8, 6 * N // 32, 1)
    parts = [header(8)]
    for key, a in tensors.items():
        parts.append(record(key, a, *((8, data) if key == name else (0, a.tobytes()))))
    (tmp_path / "m.bin").write_bytes(b"".join(parts))
    with open_checkpoint(tmp_path / "m.bin") as found:
        np.testing.assert_allclose(found.rows(name, 0, 6 * N), expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(found.rows(name, 7, 99), found.rows(name, 0, 6 * N)[7:99])
        resolve(found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    tensors = exported(official("4"), "4")
    return written(tmp_path_factory.mktemp("rwkv") / "m.bin", tensors).read_bytes()


def refused(tmp_path, raw: bytes, match: str | None = None) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(raw)

    def read() -> None:
        with open_checkpoint(path) as checkpoint:
            resolve(checkpoint)

    cheap.refused((CheckpointError, UnsupportedError), read, match)


@pytest.mark.parametrize("field", range(1, 6))
@pytest.mark.parametrize("value", [0, -1, 3, 5, 99, 102, 2**31 - 1, -(2**31)])
def test_hostile_header(tmp_path, whole, field, value):
    if struct.unpack_from("<i", whole, 4 * field)[0] == value or (field, value) == (5, 3):
        pytest.skip("a legal value: the header's type decides nothing")
    raw = bytearray(whole)
    struct.pack_into("<i", raw, 4 * field, value)
    refused(tmp_path, bytes(raw))


@pytest.mark.parametrize("field", range(5))
@pytest.mark.parametrize("value", [0, -1, 5, 6, 10, 2**20, 2**31 - 1, -(2**31)])
def test_hostile_record(tmp_path, whole, field, value):
    if struct.unpack_from("<i", whole, 24 + 4 * field)[0] == value:
        pytest.skip("the file's own value")
    raw = bytearray(whole)
    struct.pack_into("<i", raw, 24 + 4 * field, value)
    refused(tmp_path, bytes(raw))


def test_every_truncation_of_the_first_records_and_a_few_later(tmp_path, whole):
    for n in [*range(0, 60), 24 + 20 + 10 + 4 * VOCAB * N + 3, len(whole) // 2, len(whole) - 1]:
        refused(tmp_path, whole[:n])
    refused(tmp_path, whole + b"\0")
    refused(tmp_path, whole + whole[24 : 24 + 30])


def test_every_byte_of_the_heads_flipped_is_survived(tmp_path, whole):
    path = tmp_path / "m.bin"
    for at in range(4, 24 + 20 + 10):
        raw = bytearray(whole)
        raw[at] ^= 0x81
        path.write_bytes(raw)
        try:
            with open_checkpoint(path) as checkpoint:
                resolve(checkpoint)
        except FlashError:
            pass


def test_a_key_twice_and_keys_that_are_no_text(tmp_path, whole):
    a = np.ones(4, np.float32)
    refused(tmp_path, whole + record("emb.weight", a, 0, a.tobytes()), "each key once")
    for key in (b"a\0b", b"\xff\xfe", b"a b"):
        extra = struct.pack("<4i", 1, len(key), 0, 4) + key + a.tobytes()
        refused(tmp_path, whole + extra, "printable")


def test_more_records_than_any_model_has(tmp_path):
    one = b"".join(
        struct.pack("<4i", 1, 6, 0, 1) + b"%06d" % i + b"\0\0\0\0" for i in range(2**14 + 1)
    )
    refused(tmp_path, header() + one, "end of the file")


def test_types_that_are_gone_are_named(tmp_path):
    a = np.ones((2, 32), np.float32)
    for code, name in ((4, "Q4_1_O"), (5, "Q4_2"), (6, "Q4_3")):
        refused(tmp_path, header() + record("emb.weight", a, code, a.tobytes()), name)


def test_blocks_that_do_not_fill_rows(tmp_path):
    a = np.ones((32, 31), np.float32)
    refused(tmp_path, header() + record("emb.weight", a, 8, a.tobytes()), "whole blocks")


def test_missing_tensors_are_named(tmp_path):
    tensors = exported(official("7"), "7")
    for name in ("blocks.1.att.k_k", "head.weight", "blocks.2.att.v2", "emb.weight"):
        rest = {key: a for key, a in tensors.items() if key != name}
        path = written(tmp_path / "m.bin", rest)
        refused(tmp_path, path.read_bytes(), name.split(".")[-1])
