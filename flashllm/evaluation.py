"""Likelihood of a text under a model, in consecutive windows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .api import LLM
from .engine.totals import Totals
from .errors import UsageError
from .tokenization import no_tokenizer

# Logits of a window are taken in pieces, so that a large vocabulary costs no more than this.
PIECE_BYTES = 1 << 20
SEPARATOR = "<|endoftext|>"  # between the documents of a corpus


def negative_log_likelihood(
    llm: LLM,
    text: str,
    *,
    window: int | None = None,
    separator: str = SEPARATOR,
    decoding: bool = False,
    totals: Totals | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[float, int]:
    """(nats, tokens scored) of `text`.

    The text is cut at `separator` into documents and those into consecutive windows of `window`
    tokens; each window starts afresh with the model's BOS where it has one, and its tokens are
    scored given those before them in the window.  Without a BOS a window's first token is not
    scored.  In approximate mode, or with `decoding`, tokens are taken in one by one as decoding
    does, since prompts are exact.  What it took is added to `totals`.  UsageError for a window of
    less than two tokens.
    """
    if llm.tokenizer is None:
        raise no_tokenizer(llm.container.path)
    documents = [part.strip() for part in text.split(separator) if part.strip()]
    bos = [llm.tokenizer.bos_id] if llm.tokenizer.bos_id is not None else []
    size = min(llm.n_context if window is None else window, llm.n_context) - len(bos)
    if len(bos) + size < 2:
        raise UsageError(f"a window of {window} tokens has no token to score after another")
    encoded = [llm.encode(document, add_bos=False) for document in documents]
    windows = [ids[at : at + size] for ids in encoded for at in range(0, len(ids), size)]
    total, scored = 0.0, 0
    for n_done, ids in enumerate(windows, start=1):
        if len(bos) + len(ids) >= 2:
            nats, n = _score(llm, np.array(bos + ids, np.int32), decoding, totals)
            total, scored = total + nats, scored + n
        if progress is not None:
            progress(n_done, len(windows), "perplexity")
    return total, scored


def _score(
    llm: LLM, ids: np.ndarray, decoding: bool, totals: Totals | None
) -> tuple[float, int]:
    total = 0.0
    one_by_one = decoding or llm.mode == "approx"
    for first, logits in llm.logit_pieces(
        ids[:-1], piece_bytes=PIECE_BYTES, decoding=one_by_one, totals=totals
    ):
        logits = logits.astype(np.float64)
        peak = logits.max(axis=1, keepdims=True)
        normaliser = peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=1))
        targets = ids[first + 1 : first + 1 + len(logits)]
        total += float((normaliser - logits[np.arange(len(targets)), targets]).sum())
    return total, ids.size - 1
