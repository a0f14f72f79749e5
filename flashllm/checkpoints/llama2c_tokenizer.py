"""llama2.c's tokenizer.bin, said again as a tokenizer.json.

The file: int32 longest token, then per token float32 score, int32 length, bytes.  It is a
byte-pair vocabulary of the SentencePiece kind: of all neighbouring pairs the one whose joined token
scores best is merged first, so a merge's rank is that of its result's score; an unknown character
becomes its bytes' tokens; a text is encoded behind one space.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

from ..errors import CheckpointError
from .files import read_whole

_MAX_BYTES, _MAX_VOCAB, _MAX_TOKEN = 2**24, 2**18, 512
_RECORD = struct.Struct("<fi")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
_SPACE = "\u2581"


def tokenizer_files(folder: Path, vocab_size: int) -> dict[str, bytes]:
    """{"tokenizer.json": …, "tokenizer_config.json": …} of the vocabulary in `folder`, or {}."""
    for name in (f"tok{vocab_size}.bin", "tokenizer.bin"):
        if (folder / name).exists():
            tokens = read_tokens(folder / name, vocab_size)
            config = {"add_bos_token": True, "bos_token": BOS, "eos_token": EOS}
            return {
                "tokenizer.json": json.dumps(tokenizer_json(tokens)).encode(),
                "tokenizer_config.json": json.dumps(config).encode(),
            }
    return {}


def read_tokens(path: Path, vocab_size: int) -> list[tuple[str, float]]:
    """(text, score) of every token."""
    raw = read_whole(path, _MAX_BYTES)
    if len(raw) < 4 or vocab_size > _MAX_VOCAB:
        raise CheckpointError(path, "vocabulary", f"at most {_MAX_VOCAB} tokens", vocab_size)
    tokens, at = [], 4
    for number in range(vocab_size):
        if at + _RECORD.size > len(raw):
            raise CheckpointError(path, f"token {number}", f"{_RECORD.size} bytes", len(raw) - at)
        score, length = _RECORD.unpack_from(raw, at)
        at += _RECORD.size
        if not 0 <= length <= min(_MAX_TOKEN, len(raw) - at) or score != score:
            raise CheckpointError(path, f"token {number}", "a length in the file", length)
        tokens.append((raw[at : at + length].decode("utf-8", "replace"), score))
        at += length
    if at != len(raw):
        raise CheckpointError(path, "file size", at, len(raw))
    return tokens


def tokenizer_json(tokens: list[tuple[str, float]]) -> dict:
    """The vocabulary in the form of the `tokenizers` library."""
    vocab: dict[str, int] = {}
    scores: dict[str, float] = {}
    for number, (text, score) in enumerate(tokens):
        # exported with line feeds around the control tokens, and plain spaces
        text = (UNKNOWN, BOS, EOS)[number] if number < 3 else text.replace(" ", _SPACE)
        if text in vocab:
            text = f"<unused {number}>"
        vocab[text] = number
        scores[text] = score
    merges = []
    for text, number in vocab.items():
        if number < 3 or _BYTE.fullmatch(text):
            continue
        for cut in range(1, len(text)):
            if text[:cut] in vocab and text[cut:] in vocab:
                merges.append((-scores[text], number, [text[:cut], text[cut:]]))
    merges.sort()
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    sequence = [
        {"SpecialToken": {"id": BOS, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": text, "special": True, **special}
            for number, text in enumerate((UNKNOWN, BOS, EOS))
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": sequence,
            "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [1], "tokens": [BOS]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [pair for _, _, pair in merges],
        },
    }
