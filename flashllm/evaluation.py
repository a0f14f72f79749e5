"""Likelihood of a text under a model, in consecutive windows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .api import LLM

# Logits of a window are taken in pieces, so that a large vocabulary costs no more than this.
PIECE_BYTES = 1 << 20


def negative_log_likelihood(
    llm: LLM,
    text: str,
    *,
    window: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[float, int]:
    """(nats, tokens scored) of `text`.

    The text is cut into consecutive windows of `window` tokens; each starts afresh with the
    model's BOS where it has one, and its tokens are scored given those before them in the window.
    Without a BOS the first token of a window is not scored.
    """
    ids = llm.encode(text, add_bos=False)
    bos = [llm.tokenizer.bos_id] if llm.tokenizer.bos_id is not None else []
    size = min(window or llm.n_context, llm.n_context) - len(bos)
    total, scored = 0.0, 0
    for first in range(0, len(ids), size):
        part = bos + ids[first : first + size]
        if len(part) < 2:
            break
        nats, n = _score(llm, np.array(part, np.int32))
        total, scored = total + nats, scored + n
        if progress is not None:
            progress(min(first + size, len(ids)), len(ids), "perplexity")
    return total, scored


def _score(llm: LLM, ids: np.ndarray) -> tuple[float, int]:
    total = 0.0
    for first, logits in llm.logit_pieces(ids[:-1], piece_bytes=PIECE_BYTES):
        logits = logits.astype(np.float64)
        peak = logits.max(axis=1, keepdims=True)
        normaliser = peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=1))
        targets = ids[first + 1 : first + 1 + len(logits)]
        total += float((normaliser - logits[np.arange(len(targets)), targets]).sum())
    return total, ids.size - 1
