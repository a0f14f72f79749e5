"""The World vocabulary: longest match, bytes that come back, hostile files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashllm import LLM, convert
from flashllm.checkpoints.rwkv_names import byte_vocabulary
from flashllm.errors import CheckpointError, TokenizerError, UsageError
from flashllm.tokenization import Tokenizer, WorldTokenizer

from .cheap import refused
from .rwkv_models import exported, official, written

WORDS = ["  ", "the", " the", "there", "\n\n", "é", "中", "中文", b"\xe4\xb8", "a'b", 'ab"', "abcd"]


def vocabulary() -> bytes:
    tokens = [bytes([b]) for b in range(256)] + [
        word if isinstance(word, bytes) else word.encode() for word in WORDS
    ]
    lines = []
    for token_id, token in enumerate(tokens, 1):
        try:
            literal = repr(token.decode())
        except UnicodeDecodeError:
            literal = repr(token)
        lines.append(f"{token_id} {literal} {len(token)}\n")
    return "".join(lines).encode()


def slow(data: bytes, tokens: dict[bytes, int]) -> list[int]:
    ids = []
    while data:
        token = max((t for t in tokens if data.startswith(t)), key=len)
        ids.append(tokens[token])
        data = data[len(token) :]
    return ids


TOKENIZER = WorldTokenizer.from_text(vocabulary())
TOKENS = {TOKENIZER.decode_bytes([i]): i for i in range(1, TOKENIZER.vocab_size)}
PIECES = st.sampled_from([*TOKENS])


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=30), st.lists(PIECES, max_size=12).map(b"".join)))
def test_longest_match_and_round_trip(data):
    ids = TOKENIZER.encode_bytes(data)
    assert ids == slow(data, TOKENS)
    assert TOKENIZER.decode_bytes(ids) == data


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="the ré中文ab🙂\n'", max_size=20))
def test_text_comes_back_whole_and_in_pieces(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    stream = TOKENIZER.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == text


def test_ids_without_text():
    assert TOKENIZER.vocab_size == 1 + 256 + len(WORDS)
    assert TOKENIZER.is_silent(0) and TOKENIZER.token(0) is None
    assert TOKENIZER.decode([0, 66]) == "A"
    lone = WorldTokenizer.from_text(b"1 'a' 1\n")
    with pytest.raises(UsageError, match="0x62"):
        lone.encode("ab")


@pytest.mark.parametrize("raw", [
    b"", b"\n", b"x", b"1 'a' 2\n", b"1 '' 0\n", b"1 'a' 1\n1 'b' 1\n", b"-1 'a' 1\n",
    b"1 a 1\n", b"1 ['a'] 1\n", b"1 'a'+'b' 2\n", b"1 'a'.x() 1\n", b"1 '\\xzz' 1\n", b"\xff\xff\n",
    b"1 '" + b"a" * 5000 + b"' 5000\n", b"999999999 'a' 1\n", b"1 'a' 1\n\n2 'b' 1\n",
])  # fmt: skip
def test_hostile_vocabularies(raw):
    refused(TokenizerError, lambda: WorldTokenizer.from_text(raw))


def test_a_model_of_256_tokens_speaks_bytes(tmp_path):
    convert(written(tmp_path / "m.bin", exported(official("4"), "4")), tmp_path / "m.flash")
    with LLM(str(tmp_path / "m.flash"), ram_budget="2GiB") as llm:
        assert llm.encode('"in é') == list('"in é'.encode())
        np.testing.assert_array_equal(llm.logits(llm.encode('"in')), llm.logits([34, 105, 110]))
        text = llm.generate("abc", max_tokens=8, temperature=0.0, ignore_eos=True)
        assert text.text == bytes(text.tokens).decode("utf-8", "replace")
    found = Tokenizer.from_blobs(byte_vocabulary())
    assert found.encode_bytes(bytes(range(256))) == list(range(256))


def test_a_tokenizer_given_to_convert(tmp_path):
    source = written(tmp_path / "m.bin", exported(official("4"), "4"))
    (tmp_path / "vocab.txt").write_bytes(vocabulary())
    convert(source, tmp_path / "m.flash", tokenizer=tmp_path / "vocab.txt")
    with LLM(str(tmp_path / "m.flash"), ram_budget="2GiB") as llm:
        assert llm.encode("there") == [TOKENS[b"there"]]
    (tmp_path / "bad").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="World"):
        convert(source, tmp_path / "n.flash", tokenizer=tmp_path / "bad")
