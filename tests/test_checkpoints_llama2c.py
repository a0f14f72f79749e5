"""llama2.c files, versions 0 and 1: the same model as its Hugging Face form, and nothing else."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashllm.checkpoints import open_checkpoint
from flashllm.checkpoints.llama2c import parse_header, stacks
from flashllm.checkpoints.llama2c_tokenizer import read_tokens, tokenizer_json
from flashllm.conversion.resolve import resolve
from flashllm.errors import CheckpointError
from flashllm.tokenization import Tokenizer

from .cheap import refused

GOLDEN = Path(__file__).parent / "golden"
DATA = Path(os.environ.get("FLASHLLM_DATA", Path(__file__).parents[2] / "shared" / "data"))


def written(folder: Path, variant: str, version: int) -> Path:
    """A golden llama as that project would export it."""
    with open_checkpoint(GOLDEN / variant) as source:
        config = resolve(source).config
        numbers = [config.hidden_size, config.intermediate_size, config.n_layers, config.n_heads]
        numbers += [config.n_kv_heads, config.vocab_size, config.n_context]
        if version == 1:
            head = struct.pack("<Ii7iB", 0x616B3432, 1, *numbers, config.tied).ljust(256, b"\0")
        else:
            numbers[5] *= 1 if config.tied else -1
            head = struct.pack("<7i", *numbers)
        data = [head]
        for name, n_layers, shape in stacks(parse_header(head, "test")):
            for i in range(n_layers):
                if name == "rotary tables":
                    data.append(np.full(shape, np.nan, np.float32).tobytes())
                    continue
                rows = source.rows(name.format(i=i), 0, shape[0])
                if "q_proj" in name or "k_proj" in name:  # halves back to adjacent pairs
                    rows = rows.reshape(-1, 2, config.head_dim // 2, shape[1])
                    rows = rows.transpose(0, 2, 1, 3).reshape(shape)
                data.append(rows.astype("<f4").tobytes())
    path = folder / "model.bin"
    path.write_bytes(b"".join(data))
    return path


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("variant", ["llama-mha", "llama-tied", "llama-sharded"])
def test_the_same_tensors_as_the_other_form(tmp_path, variant, version):
    path = written(tmp_path, variant, version)
    with open_checkpoint(GOLDEN / variant) as expected, open_checkpoint(path) as found:
        assert found.kind == "llama2.c"
        assert set(found.names()) == set(expected.names())
        for name in found.names():
            n = found.shape(name)[0]
            assert found.shape(name) == expected.shape(name)
            np.testing.assert_array_equal(found.rows(name, 0, n), expected.rows(name, 0, n))
            for start, stop in ((0, 1), (n // 3, n - 1), (n - 1, n), (3, 3)):
                part = found.rows(name, start, stop)
                np.testing.assert_array_equal(part, expected.rows(name, start, stop))
        config = resolve(found).config
        assert config.norm_eps == 1e-5 and config.tied == resolve(expected).config.tied


@pytest.mark.parametrize("version", [0, 1])
def test_a_file_of_any_other_length_is_refused(tmp_path, version):
    path = written(tmp_path, "llama-tied", version)
    whole = path.read_bytes()
    for n in (0, 1, 4, 15, 27, 28, 255, 256, 1000, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    path.write_bytes(whole + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match="file size"):
        open_checkpoint(path)


HOSTILE = [
    (version, position, value)
    for version in (0, 1)
    for position in range(7)
    for value in (0, -(2**31), 2**31 - 1, 3, -1)
    # a shorter context is a legal change where no tables depend on it
    if (version, position, value) != (1, 6, 3)
]


@pytest.mark.parametrize(("version", "position", "value"), HOSTILE)
def test_hostile_numbers(tmp_path, version, position, value):
    path = written(tmp_path, "llama-tied", version)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<i", raw, (8 if version else 0) + 4 * position, value)
    path.write_bytes(raw)
    refused(CheckpointError, lambda: open_checkpoint(path))


def test_unknown_version_is_named(tmp_path):
    path = written(tmp_path, "llama-tied", 1)
    raw = bytearray(path.read_bytes())
    struct.pack_into("<i", raw, 4, 2)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="version"):
        open_checkpoint(path)


TOKENS = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256))]
WORDS = [" t", "he", " a", " the", "an", "nd", " and", "th", " th", "the", "é"]
SINGLE = [" ", "t", "h", "e", "a", "n", "d"]


def vocabulary(folder: Path) -> Path:
    everything = TOKENS + WORDS + SINGLE
    raw = struct.pack("<i", 8)
    for number, text in enumerate(everything):
        score = -float(max(0, number - len(TOKENS)))
        data = text.encode()
        raw += struct.pack("<fi", score, len(data)) + data
    path = folder / f"tok{len(everything)}.bin"
    path.write_bytes(raw)
    return path


def greedy(text: str, tokens) -> list[int]:
    """That project's own procedure: join the best-scoring neighbours until none can be joined."""
    texts = [t for t, _ in tokens]
    ids = [1, texts.index(" ")] if text else [1]
    for character in text:
        if character in texts:
            ids.append(texts.index(character))
        else:
            ids += [byte + 3 for byte in character.encode()]
    while True:
        best = None
        for i in range(1, len(ids) - 1):
            joined = texts[ids[i]] + texts[ids[i + 1]]
            if joined in texts:
                score = tokens[texts.index(joined)][1]
                if best is None or score > best[0]:
                    best = (score, i, texts.index(joined))
        if best is None:
            return ids
        ids[best[1] : best[1] + 2] = [best[2]]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    import json

    path = vocabulary(tmp_path_factory.mktemp("tok"))
    tokens = read_tokens(path, len(TOKENS + WORDS + SINGLE))
    blobs = {
        "tokenizer.json": json.dumps(tokenizer_json(tokens)).encode(),
        "tokenizer_config.json": b'{"bos_token": "<s>", "add_bos_token": true}',
    }
    return tokens, Tokenizer.from_blobs(blobs)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="thean d é🙂", min_size=1, max_size=16))
def test_tokens_are_those_of_the_greedy_procedure(vocabularies, text):
    tokens, tokenizer = vocabularies
    ids = tokenizer.encode(text)
    assert ids == greedy(text, tokens)
    assert tokenizer.decode(ids) == text


def test_hostile_vocabularies(tmp_path):
    path = vocabulary(tmp_path)
    n = len(TOKENS + WORDS + SINGLE)
    whole = path.read_bytes()
    for raw in (b"", whole[:3], whole[:-1], whole + b"\0"):
        path.write_bytes(raw)
        refused(CheckpointError, lambda: read_tokens(path, n))
    for length in (-1, 2**31 - 1, 10**6):
        raw = bytearray(whole)
        struct.pack_into("<i", raw, 8, length)
        path.write_bytes(raw)
        refused(CheckpointError, lambda: read_tokens(path, n), "token 0")
    path.write_bytes(whole)
    for wrong in (n + 1, n - 1, 2**24):
        refused(CheckpointError, lambda wrong=wrong: read_tokens(path, wrong))


@pytest.mark.skipif(not (DATA / "llama2c").is_dir(), reason="no shared data")
def test_a_published_model_and_its_tokenizer():
    with open_checkpoint(DATA / "llama2c" / "stories260K.bin") as checkpoint:
        assert checkpoint.shape("model.layers.4.mlp.down_proj.weight") == (64, 172)
        tokenizer = Tokenizer.from_blobs(checkpoint.tokenizer_files)
    ids = tokenizer.encode("Once upon a time")
    tokens = read_tokens(DATA / "llama2c" / "tok512.bin", 512)
    assert ids == greedy("Once upon a time", tokens) and len(ids) == 5
