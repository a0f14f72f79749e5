"""Encode, decode and stream over small tokenizers of the kinds that checkpoints carry."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashllm.errors import TokenizerError, UsageError
from flashllm.tokenization import Tokenizer, no_tokenizer

from .cheap import refused

tokenizers = pytest.importorskip("tokenizers")

SPECIALS = ["<unk>", "<s>", "</s>"]


def sentencepiece_like(*, bos_in_file=False) -> bytes:
    """Byte fallback, a leading space added on the way in and stripped on the way out."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    words = ["▁", "▁▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "é", "▁é", ".", "�", "▁�"]
    vocab = {token: i for i, token in enumerate(SPECIALS + bytes_ + words)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab"), ("▁", "▁"), ("▁", "é"), ("▁", "�")]
    model = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens(SPECIALS)
    n, d = tokenizers.normalizers, tokenizers.decoders
    made.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    made.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    if bos_in_file:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    made.enable_truncation(4)
    made.enable_padding(length=9)
    return made.to_str().encode()


def byte_level() -> bytes:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIALS + alphabet + ["Ġa", "ab", "Ã©"])}
    merges = [("Ġ", "a"), ("a", "b"), ("Ã", "©")]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    made.add_special_tokens(SPECIALS)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made.to_str().encode()


def metaspace() -> bytes:
    tokens = SPECIALS + ["▁", "a", "b", "▁a", "▁ab", "é"]
    made = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(token, -float(i)) for i, token in enumerate(tokens)], 0)
    )
    made.add_special_tokens(SPECIALS)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    return made.to_str().encode()


FILES = {"sentencepiece": sentencepiece_like, "byte-level": byte_level, "metaspace": metaspace}
TOKENIZERS = {
    name: Tokenizer.from_blobs({"tokenizer.json": make()}) for name, make in FILES.items()
}


def streamed(tokenizer, ids) -> str:
    stream = tokenizer.stream()
    return "".join([stream.push(i) for i in ids] + [stream.flush()])


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_stream_joins_to_decode_of_any_ids(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=24))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["sentencepiece", "byte-level"])
@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab é.🙂漢\u200d\n", max_size=20))
def test_text_survives_encode_and_stream(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_bos=False)
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text


def test_no_delta_holds_half_a_character():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("a🙂b漢")
    stream = tokenizer.stream()
    deltas = [stream.push(i) for i in ids]
    assert not any("\ufffd" in delta for delta in deltas)
    assert [delta for delta in deltas if delta] == ["a", "🙂", "b", "漢"]


def test_cut_character_is_flushed_as_replacement():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("a🙂")[:-1]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids) == "a\ufffd"


def test_work_per_token_is_bounded():
    tokenizer = TOKENIZERS["sentencepiece"]
    stream = tokenizer.stream()
    for token_id in tokenizer.encode("ab a b ab. " * 200):
        stream.push(token_id)
        assert len(stream._context) + len(stream._held) < 8


def test_one_text_has_one_row_of_ids():
    """Merges dropped at random are for training (P13)."""
    raw = json.loads(sentencepiece_like())
    raw["model"]["dropout"] = 0.5
    tokenizer = Tokenizer.from_blobs({"tokenizer.json": json.dumps(raw).encode()})
    ids = TOKENIZERS["sentencepiece"].encode("ab ab ab ab")
    assert all(tokenizer.encode("ab ab ab ab") == ids for _ in range(8))


def test_stored_truncation_and_padding_are_off():
    ids = TOKENIZERS["sentencepiece"].encode("a b a b a b a b a b a b")
    assert len(ids) == 12


BOS_CASES = [
    # in the file, add_bos_token, asked, expected first id is BOS
    (False, None, None, False),
    (False, True, None, True),
    (False, True, False, False),
    (False, None, True, True),
    (True, None, None, True),
    (True, True, None, True),
    (True, False, None, False),
    (True, None, False, False),
    (True, True, True, True),
]


@pytest.mark.parametrize(("in_file", "config", "asked", "expected"), BOS_CASES)
def test_bos_is_added_once_or_not_at_all(in_file, config, asked, expected):
    blobs = {
        "tokenizer.json": sentencepiece_like(bos_in_file=in_file),
        "tokenizer_config.json": json.dumps(
            {"bos_token": {"content": "<s>"}, "add_bos_token": config}
        ).encode(),
    }
    tokenizer = Tokenizer.from_blobs(blobs)
    assert tokenizer.bos_id == 1
    ids = tokenizer.encode("a b", add_bos=asked)
    assert ids.count(1) == int(expected) and (ids[0] == 1) == expected
    # a template that wrote it itself
    assert tokenizer.encode("<s>a b", add_bos=asked).count(1) == 1


def test_bos_of_the_model_is_used_where_the_files_name_none():
    tokenizer = Tokenizer.from_blobs({"tokenizer.json": byte_level()}, bos_id=2)
    assert tokenizer.encode("a", add_bos=True)[0] == 2
    assert tokenizer.encode("a")[0] != 2


def test_special_tokens_are_skipped_in_text():
    tokenizer = TOKENIZERS["byte-level"]
    ids = [1, *tokenizer.encode("ab"), 2]
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == "ab"
    assert tokenizer.decode(ids, skip_special=False) == "<s>ab</s>"


def test_numpy_ids_are_ids():
    tokenizer = TOKENIZERS["byte-level"]
    ids = np.asarray(tokenizer.encode("ab é"), np.int32)
    assert tokenizer.decode(ids) == "ab é"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"model": {"type": "BPE"}}', b"null"],
)
def test_unreadable_tokenizer_is_a_typed_error(content):
    blobs = {"tokenizer.json": content}
    refused(TokenizerError, lambda: Tokenizer.from_blobs(blobs, path="model.flash"), "model.flash")


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 100_000])
def test_unreadable_tokenizer_config_is_a_typed_error(content):
    blobs = {"tokenizer.json": byte_level(), "tokenizer_config.json": content}
    refused(TokenizerError, lambda: Tokenizer.from_blobs(blobs), "tokenizer_config.json")


def test_absent_tokenizer_and_bad_arguments():
    assert Tokenizer.from_blobs({}) is None
    assert "pass token ids" in str(no_tokenizer("model.flash"))
    for bad in ([-1], [2**40]):
        with pytest.raises(UsageError):
            TOKENIZERS["byte-level"].decode(bad)
    for bad in (b"a", None, "\ud800"):
        with pytest.raises(UsageError):
            TOKENIZERS["byte-level"].encode(bad)
