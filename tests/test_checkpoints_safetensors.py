"""Safetensors: what is read equals what was written, and hostile files are refused early."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from flashllm.checkpoints import open_checkpoint, widen
from flashllm.errors import CheckpointError, ClosedError, FlashReadError, UnsupportedError

from .cheap import refused

GOLDEN = Path(__file__).parent / "golden"
CONFIG = {"model_type": "llama", "vocab_size": 8}


def put(folder: Path, header, data: bytes = b"", *, n_header=None, config=CONFIG) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    n_header = len(raw) if n_header is None else n_header
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", n_header) + raw + data)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return path


def entry(begin, end, shape=None, dtype="U8"):
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_equal_the_reference_reader(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("c")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    tensors = {}
    for i in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3))
        dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
        tensors[f"t{i}"] = rng.standard_normal(shape).astype(dtype)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"a": 1}')
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.names()) == set(tensors)
        for name, expected in tensors.items():
            assert checkpoint.shape(name) == expected.shape
            start = data.draw(st.integers(0, len(expected)))
            stop = data.draw(st.integers(start, len(expected)))
            found = checkpoint.stored_rows(name, start, stop)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected[start:stop])
            rows = checkpoint.rows(name, start, stop)
            assert rows.dtype == np.float32
            np.testing.assert_array_equal(rows, expected[start:stop].astype(np.float32))


def test_bfloat16_bits_widen_to_their_values(tmp_path):
    bits = np.array([[0x3F80, 0xC000, 0x0000, 0x7F80]], "<u2")  # 1, -2, 0, inf
    put(tmp_path, {"w": entry(0, 8, [1, 4], "BF16")}, bits.tobytes())
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.dtype("w") == "bf16"
        assert checkpoint.rows("w", 0, 1).tolist() == [[1.0, -2.0, 0.0, np.inf]]
        np.testing.assert_array_equal(checkpoint.stored_rows("w", 0, 1), bits)
    assert widen(bits, "bf16").dtype == np.float32


def test_shards_index_and_files_are_the_same_checkpoint():
    folder = GOLDEN / "llama-sharded"
    with (
        open_checkpoint(folder) as one,
        open_checkpoint(folder / "model.safetensors.index.json") as other,
    ):
        assert one.names() == other.names() and len(one.names()) == 21
        for name in one.names():
            n = one.shape(name)[0]
            np.testing.assert_array_equal(one.rows(name, 0, n), other.rows(name, 0, n))
    with open_checkpoint(GOLDEN / "qwen3" / "model.safetensors") as single:
        assert single.config["model_type"] == "qwen3"
    with open_checkpoint(GOLDEN / "qwen3" / "config.json") as single:
        assert single.config["model_type"] == "qwen3"


def test_kind_is_told_by_content(tmp_path):
    for file in (GOLDEN / "qwen3").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.gguf")
    with open_checkpoint(tmp_path / "weights.gguf") as checkpoint:
        assert "model.norm.weight" in checkpoint


KINDS = [
    (b"GGUF\x03\0\0\0", "GGUF"),
    (b"lmgg" + b"\0" * 20, "legacy ggml"),
    (b"\x80\x02}q\x00.", "pickle"),
    (b"\x80\x04\x95" + b"\0" * 20, "pickle"),
]


@pytest.mark.parametrize(("head", "name"), KINDS)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_kinds_known_by_name_are_refused_by_name(tmp_path, head, name, file):
    (tmp_path / file).write_bytes(head)
    for path in (tmp_path, tmp_path / file):
        with pytest.raises(UnsupportedError, match=name):
            open_checkpoint(path)


def test_unreadable_types_are_listed_and_refused_when_read(tmp_path):
    put(tmp_path, {"w": entry(0, 4, [4], "F8_E4M3")}, b"\0" * 4)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names() == ["w"]
        with pytest.raises(UnsupportedError, match="F8_E4M3"):
            checkpoint.rows("w", 0, 4)


def nested(n):
    return b'{"a":' + b"[" * n + b"]" * n + b"}"


BIG = 2**63
HOSTILE = {
    "empty header object but data": ({}, b"xx"),
    "hole at the start": ({"a": entry(1, 3)}, b"xxx"),
    "hole between": ({"a": entry(0, 1), "b": entry(2, 3)}, b"xxx"),
    "overlap": ({"a": entry(0, 2), "b": entry(1, 3)}, b"xxx"),
    "same range twice": ({"a": entry(0, 3), "b": entry(0, 3)}, b"xxx"),
    "one byte beyond the file": ({"a": entry(0, 4)}, b"xxx"),
    "2**63 beyond the file": ({"a": entry(0, BIG)}, b"xxx"),
    "trailing bytes": ({"a": entry(0, 2)}, b"xxx"),
    "backwards": ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 0]}}, b"xx"),
    "size is not shape times type": ({"a": entry(0, 3, [2])}, b"xxx"),
    "product overflows": ({"a": entry(0, 0, [2**32, 2**32, 2**32])}, b""),
    "negative dimension": ({"a": entry(0, 3, [-3])}, b"xxx"),
    "fractional dimension": ({"a": entry(0, 3, [3.0])}, b"xxx"),
    "boolean dimension": ({"a": entry(0, 1, [True])}, b"x"),
    "9 dimensions": ({"a": entry(0, 1, [1] * 9)}, b"x"),
    "100000 dimensions": ({"a": entry(0, 1, [1] * 100_000)}, b"x"),
    "unknown type": ({"a": entry(0, 3, dtype="F7")}, b"xxx"),
    "type is a number": ({"a": entry(0, 3, dtype=7)}, b"xxx"),
    "three offsets": ({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3, 3]}}, b"xxx"),
    "unknown key": ({"a": {**entry(0, 3), "evil": 1}}, b"xxx"),
    "missing key": ({"a": {"dtype": "U8", "shape": [3]}}, b"xxx"),
    "tensor is a list": ({"a": [1]}, b"xxx"),
    "metadata is nested": ({"__metadata__": {"x": {"y": "z"}}, "a": entry(0, 1)}, b"x"),
    "name of 100 kB": ({"a" * 100_000: entry(0, 1)}, b"x"),
    "duplicate tensor": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
    ),
    "duplicate key": (b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "not UTF-8": (b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "a list": (b"[]", b""),
    "not JSON": (b'{"a"', b""),
    "text after the object": (b"{}{}", b""),
    "a million brackets": (nested(1_000_000), b""),
    "a million empty objects": (b'{"a":[' + b"{}," * 1_000_000 + b"{}]}", b""),
    "a number of a million digits": (
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,1]}}',
        b"x",
    ),
    "a million metadata keys unfinished": (
        b'{"__metadata__":{' + b",".join(b'"%d":"x"' % i for i in range(40_000)) + b",}}",
        b"",
    ),
    "many good tensors, then a bad one": (
        {**{f"t{i}": entry(i, i + 1) for i in range(20_000)}, "z": entry(0, 1)},
        b"x" * 20_000,
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused_within_a_second_and_16_mib(tmp_path, kind):
    header, data = HOSTILE[kind]
    path = put(tmp_path, header, data)
    refused(CheckpointError, lambda: open_checkpoint(path), "model.safetensors")


@pytest.mark.parametrize("n_header", [0, 1, 3, 2**31, 2**63, 2**64 - 1])
def test_lying_header_lengths(tmp_path, n_header):
    path = put(tmp_path, {"a": entry(0, 3)}, b"xxx", n_header=n_header)
    refused(CheckpointError, lambda: open_checkpoint(path))


def test_every_truncation_is_detected(tmp_path):
    path = put(tmp_path, {"a": entry(0, 8), "b": entry(8, 12)}, b"x" * 12)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_a_terabyte_of_nothing_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.truncate(2**40)
    refused(CheckpointError, lambda: open_checkpoint(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fifo_directory_and_absence(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="FIFO"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "d").mkdir()
    with pytest.raises(CheckpointError, match="safetensors"):
        open_checkpoint(tmp_path / "d")
    (tmp_path / "d" / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="a directory"):
        open_checkpoint(tmp_path / "d")


def test_several_files_without_an_index_are_ambiguous(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        put(tmp_path, {"a": entry(0, 1)}, b"x").rename(tmp_path / name)
    with pytest.raises(CheckpointError, match="a.safetensors, b.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config", [None, [], "x", 3], ids=["absent", "a list", "a text", "a number"]
)
def test_config_must_be_an_object(tmp_path, config):
    put(tmp_path, {"a": entry(0, 1)}, b"x", config=config)
    with pytest.raises(CheckpointError, match="config.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, "9" * 2**19])
def test_config_bombs(tmp_path, text):
    put(tmp_path, {"a": entry(0, 1)}, b"x", config=None)
    (tmp_path / "config.json").write_text(text)
    refused(CheckpointError, lambda: open_checkpoint(tmp_path), "config.json")


SHARD_NAMES = ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b", 3, None, ["x"]]


@pytest.mark.parametrize("shard", SHARD_NAMES, ids=str)
def test_index_names_only_files_beside_it(tmp_path, shard):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"w": shard}}))
    with pytest.raises(CheckpointError, match="index.json"):
        open_checkpoint(tmp_path)


INDEXES = {
    "no map": {"metadata": {}},
    "empty map": {"weight_map": {}},
    "tensor nowhere": {"weight_map": {"a": "s.safetensors", "z": "s.safetensors"}},
    "tensor elsewhere": {"weight_map": {"a": "t.safetensors", "b": "s.safetensors"}},
    "missing shard": {"weight_map": {"a": "s.safetensors", "q": "missing.safetensors"}},
}


@pytest.mark.parametrize("kind", INDEXES)
def test_index_and_shards_must_agree(tmp_path, kind):
    for name, tensor in (("s.safetensors", "a"), ("t.safetensors", "b")):
        put(tmp_path, {tensor: entry(0, 1)}, b"x").rename(tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(INDEXES[kind]))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


def test_file_shrinking_under_the_reader_is_a_read_error(tmp_path):
    path = put(tmp_path, {"a": entry(0, 400, [100], "F32")}, b"x" * 400)
    with open_checkpoint(tmp_path) as checkpoint:
        os.truncate(path, 200)
        with pytest.raises(FlashReadError, match="short"):
            checkpoint.rows("a", 0, 100)


def test_closed_and_absent(tmp_path):
    put(tmp_path, {"a": entry(0, 4, [1], "F32")}, b"\0" * 4)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="nothing"):
        checkpoint.rows("b", 0, 1)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(ClosedError):
        checkpoint.rows("a", 0, 1)


@pytest.mark.parametrize("n", [4, 3_000_000])
def test_fingerprint_follows_the_content(tmp_path, n):
    def fingerprint():
        with open_checkpoint(tmp_path) as checkpoint:
            return checkpoint.fingerprint

    data = np.random.default_rng(0).bytes(n)
    path = put(tmp_path, {"a": entry(0, n)}, data)
    first = fingerprint()
    os.utime(path, ns=(1, 1))
    assert fingerprint() == first  # as a copy
    put(tmp_path, {"a": entry(0, n)}, data[: n // 2] + bytes(n - n // 2))
    assert fingerprint() != first
    put(tmp_path, {"b": entry(0, n)}, data)
    assert fingerprint() != first
    put(tmp_path, {"a": entry(0, n)}, data, config={"model_type": "opt"})
    assert fingerprint() != first


def test_tokenizer_files_are_carried_verbatim(tmp_path):
    put(tmp_path, {"a": entry(0, 1)}, b"x")
    (tmp_path / "tokenizer.json").write_bytes(b"\x00anything")
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ x }}")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tokenizer_files == {
            "tokenizer.json": b"\x00anything",
            "chat_template.jinja": b"{{ x }}",
        }


def test_parts_of_fused_tensors_have_names(tmp_path):
    three = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    save_file({"fused": three, "flat": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with open_checkpoint(tmp_path) as checkpoint:
        name = "fused[2:5 of 6]"
        assert name in checkpoint and name not in checkpoint.names()
        assert checkpoint.shape(name) == (3, 4) and checkpoint.dtype(name) == "f32"
        rows = three.reshape(6, 4)[2:5]
        np.testing.assert_array_equal(checkpoint.stored_rows(name, 0, 3), rows)
        np.testing.assert_array_equal(checkpoint.stored_rows(name, 1, 2), rows[1:2])
        assert "none[0:1 of 1]" not in checkpoint
        for wrong in ("fused[2:5 of 7]", "fused[2:7 of 6]", "fused[5:2 of 6]", "flat[0:4 of 4]"):
            with pytest.raises(CheckpointError, match="rows"):
                checkpoint.shape(wrong)
