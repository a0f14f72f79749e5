"""Tiny containers for tests of the API and the command line: made on the spot, with a tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from flashllm import convert

GOLDEN = Path(__file__).parent / "golden"
VOCAB = 64  # of every golden checkpoint


def tokenizer_json() -> str:
    """A byte-level BPE of VOCAB ids: a BOS, and pieces that cut UTF-8 letters apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    wanted = "abcdefghijklmnopqrstuvwxyz .,'!?ABCDEFGHIJKLMNO\n"
    visible = [bytes_as_letter(b) for b in wanted.encode() + "äé€🙂".encode()]
    letters = list(dict.fromkeys(visible))[: VOCAB - 2]
    assert all(letter in alphabet for letter in letters)
    vocab = {"<bos>": 0, "<eos>": 1, **{letter: i + 2 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return tokenizer.to_str()


def bytes_as_letter(byte: int) -> str:
    """GPT-2's printable stand-in for a byte: printable ones as they are, others from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in plain:
        return chr(byte)
    return chr(256 + sum(1 for b in range(byte) if b not in plain))


def checkpoint(folder: Path, variant: str = "llama-relu", *, tokenizer: bool = True) -> Path:
    """A copy of a golden checkpoint, with a tokenizer of our own."""
    path = folder / variant
    shutil.copytree(GOLDEN / variant, path)
    if tokenizer:
        (path / "tokenizer.json").write_text(tokenizer_json())
        (path / "tokenizer_config.json").write_text(
            json.dumps({"add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>"})
        )
    return path


def container(folder: Path, variant: str = "llama-relu", *, tokenizer: bool = True, **options):
    """A container of a golden checkpoint in `folder`."""
    out = folder / f"{variant}.flash"
    convert(str(checkpoint(folder, variant, tokenizer=tokenizer)), str(out), **options)
    return out
