"""Granite (arXiv 2405.04324): Llama's layers with constants in place of what widths would give."""

from __future__ import annotations

import numpy as np

from .llama import LlamaModel


class GraniteModel(LlamaModel):
    def __init__(self, config, planes, vectors, store, kernels, *, max_tokens, n_context, path=""):
        super().__init__(
            config, planes, vectors, store, kernels,
            max_tokens=max_tokens, n_context=n_context, path=path,
        )  # fmt: skip
        self.scale = config.attention_factor

    def embed(self, plane: str, ids: np.ndarray, out: np.ndarray) -> None:
        super().embed(plane, ids, out)
        out *= np.float32(self.config.embedding_factor)

    def _norm_added(self, name: str, added: np.ndarray) -> None:
        """What a sublayer adds is scaled, not normed."""
        self.kernels.scale(added, self.config.residual_factor)

    def _logits(self, hidden: np.ndarray, out: np.ndarray) -> None:
        super()._logits(hidden, out)
        out /= np.float32(self.config.logit_divisor)
