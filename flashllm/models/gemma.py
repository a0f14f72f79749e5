"""Gemma (arXiv 2403.08295, 2408.00118, 2503.19786): Llama's layers under RMSNorms whose weight is
stored less one, with a scaled embedding, soft caps, and a rope of its own where a window is."""

from __future__ import annotations

import math

import numpy as np

from .llama import LlamaModel
from .rope_table import RopeTable


class GemmaModel(LlamaModel):
    def __init__(self, config, planes, vectors, store, kernels, *, max_tokens, n_context, path=""):
        vectors = {
            name: vector + np.float32(1) if name.endswith("norm.weight") else vector
            for name, vector in vectors.items()
        }
        super().__init__(
            config, planes, vectors, store, kernels,
            max_tokens=max_tokens, n_context=n_context, path=path,
        )  # fmt: skip
        self.scale, self.cap = config.query_scalar**-0.5, config.attention_cap
        self.local_rope = self.rope
        if config.local_rope != config.rope:
            self.local_rope = RopeTable(config.local_rope, n_context)
        self._embedding_scale = np.float32(math.sqrt(config.hidden_size))

    @classmethod
    def context_bytes(cls, config, n_context: int, dtype: np.dtype, kernels) -> int:
        second = 0
        if config.local_rope != config.rope:
            second = RopeTable.bytes_needed(config.local_rope.n_rotated, n_context)
        return second + super().context_bytes(config, n_context, dtype, kernels)

    def rope_of(self, layer: int) -> RopeTable:
        return self.local_rope if self.config.windows[layer] else self.rope

    def embed(self, plane: str, ids: np.ndarray, out: np.ndarray) -> None:
        super().embed(plane, ids, out)
        out *= self._embedding_scale

    def _logits(self, hidden: np.ndarray, out: np.ndarray) -> None:
        super()._logits(hidden, out)
        cap = np.float32(self.config.logit_cap)
        for row in out if cap else ():
            row /= cap
            np.tanh(row, out=row)
            row *= cap
