"""Text to token arrays, and the batches that training reads."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"


def read_text(path: Path) -> str:
    """The whole text of a plain or .xz file."""
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8") as f:
            return f.read()
    return path.read_text(encoding="utf-8")


def books(text: str) -> list[str]:
    """The books of a corpus file, without the blank lines around the separators."""
    return [b for b in (part.strip() for part in text.split(END)) if b]


def train_tokenizer(texts: list[str], vocab_size: int, sample_chars: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) on an even sample of the books."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    per_book = max(1, sample_chars // len(texts))
    # From the middle of each book: title pages and tables of contents are not typical prose.
    sample = (t[len(t) // 3 : len(t) // 3 + per_book] for t in texts)
    tok.train_from_iterator(sample, trainer)
    return tok


def encode_books(tok: Tokenizer, texts: list[str]) -> np.ndarray:
    """All books as one uint16 array, each one opened by the end-of-text token (id 0)."""
    parts: list[np.ndarray] = []
    for text in texts:
        # Paragraph groups of about 20 kB, cut at blank lines, let the library use every core.
        pieces, start = [], 0
        while start < len(text):
            cut = text.find("\n\n", start + 20_000)
            cut = len(text) if cut < 0 else cut
            pieces.append(text[start:cut])
            start = cut
        parts.append(np.zeros(1, dtype=np.uint16))
        for enc in tok.encode_batch(pieces, add_special_tokens=False):
            parts.append(np.asarray(enc.ids, dtype=np.uint16))
    return np.concatenate(parts)


def prepare(corpus: Path, work: Path, vocab_size: int, sample_chars: int) -> Tokenizer:
    """Train the tokenizer and encode the corpus once; later calls reuse the files in work."""
    tok_file, ids_file = work / "tokenizer.json", work / "train.npy"
    if not tok_file.exists() or not ids_file.exists():
        texts = books(read_text(corpus))
        tok = train_tokenizer(texts, vocab_size, sample_chars)
        tok.save(str(tok_file))
        np.save(ids_file, encode_books(tok, texts))
    return Tokenizer.from_file(str(tok_file))


def batches(
    ids: np.ndarray, tokens: int, context: int, bos_share: float, seed: int, epoch: int
) -> Iterator[torch.Tensor]:
    """One shuffled pass over ids as [tokens/context, context + 1] batches.

    Windows do not overlap; their grid is shifted at random in every pass. A share of the windows
    gets the end-of-text token in place of its first token, so that the model, which is always
    prompted with that token first, takes it as "text starts here" and not as "title page".
    """
    rng = np.random.default_rng([seed, epoch, context])
    shift = int(rng.integers(0, context))
    starts = np.arange(shift, len(ids) - context - 1, context)
    rng.shuffle(starts)
    rows = tokens // context
    for i in range(0, len(starts) - rows + 1, rows):
        batch = np.stack([ids[s : s + context + 1] for s in starts[i : i + rows]]).astype(np.int64)
        batch[rng.random(rows) < bos_share, 0] = 0
        yield torch.from_numpy(batch)
