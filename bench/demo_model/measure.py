"""Bits per character and active shares of a model on a text."""

from __future__ import annotations

import math

import torch
from model import Decoder
from tokenizers import Tokenizer


@torch.no_grad()
def bits_per_character(
    model: Decoder, tok: Tokenizer, text: str, context: int = 256, bf16: bool = False
) -> tuple[float, list[float]]:
    """Bits per Unicode character and active share per layer, over consecutive windows.

    Every token of the text is predicted exactly once. A window holds `context` targets; its first
    input is the end-of-text token, so no window sees anything before itself.
    """
    ids = torch.tensor(tok.encode(text, add_special_tokens=False).ids)
    nats, active, count = 0.0, torch.zeros(model.cfg.layers), 0
    span = 16 * context
    for start in range(0, len(ids), span):
        part = ids[start : start + span]
        full = len(part) // context * context
        for rows in (part[:full].view(-1, context), part[full:].view(1, -1)):
            if rows.numel() == 0:
                continue
            inputs = torch.cat((torch.zeros(len(rows), 1, dtype=torch.long), rows[:, :-1]), 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, _, share = model(inputs, rows)
            nats += loss.item() * rows.numel()
            active += share * rows.numel()
            count += rows.numel()
    return nats / math.log(2) / len(text), (active / count).tolist()
