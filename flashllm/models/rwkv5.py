"""RWKV-5's time-mix ("Eagle", arXiv 2404.05892): a matrix of memory per head.

Per token and head, with memory S [keys, values]: out = r (first * k v + S), S = decay * S + k v.
5.1 decays a head as a whole and has no gate; 5.2 decays key by key.
"""

from __future__ import annotations

import numpy as np

from .rwkv_mix import TimeMix, memories


class TimeMix5(TimeMix):
    vector_names = ("decay", "first", "head_norm.weight", "head_norm.bias")

    def _layer_vectors(self, prefix: str) -> dict[str, np.ndarray]:
        vectors = super()._layer_vectors(prefix)
        if self.config.version == "5.1":  # one number a head: spread over its keys
            for name in ("decay", "first"):
                vectors[name] = np.repeat(vectors[name], self.config.head_dim)
        return vectors

    @classmethod
    def vector_bytes(cls, config) -> int:
        return 8 * config.hidden_size * config.n_layers if config.version == "5.1" else 0

    @classmethod
    def widths(cls, config) -> dict[str, int]:
        return super().widths(config) | {"g": config.hidden_size}

    def planes(self, layer: int) -> tuple[str, ...]:
        return ("r", "k", "v", "o") if self.config.version == "5.1" else ("r", "k", "v", "g", "o")

    def forward(self, layer: int, x, before, state, out) -> None:
        names = "rkv" if self.config.version == "5.1" else "rkvg"
        self.recall(layer, self.projections(layer, x, before, names), state, out)

    def recall(self, layer: int, tokens: dict[str, np.ndarray], state, out) -> None:
        """`out` from what the projections say and the memory holds, which takes them in."""
        heads = self.model.scratch.view("heads", out.shape[0])
        for t, kept in memories(state, layer, out.shape[0]):
            self.kernels.rwkv5(
                {name: rows[t] for name, rows in tokens.items()}, self.vectors[layer],
                self.config.group_norm_eps, kept["memory"], heads[t],
            )  # fmt: skip
        self.model.linear(f"layers.{layer}.o", heads, out)
