"""RWKV-5's time-mix ("Eagle", arXiv 2404.05892): a matrix of memory per head.

Per token and head, with memory S [keys, values]: out = r (first * k v + S), S = decay * S + k v.
5.1 decays a head as a whole and has no gate; 5.2 decays key by key.
"""

from __future__ import annotations

import numpy as np

from .rwkv_mix import TimeMix


class TimeMix5(TimeMix):
    @classmethod
    def widths(cls, config) -> dict[str, int]:
        return super().widths(config) | {"g": config.hidden_size}

    def planes(self, layer: int) -> tuple[str, ...]:
        return ("r", "k", "v", "o") if self.config.version == "5.1" else ("r", "k", "v", "g", "o")

    def forward(self, layer: int, x, before, state, out) -> None:
        prefix, vectors = f"layers.{layer}.", self.model.vectors
        projected = {name: self.project(prefix, name, x, before) for name in self.planes(0)[:-1]}
        n_heads = self.config.n_heads
        decay = vectors[prefix + "decay"].reshape(n_heads, -1, 1)
        first = vectors[prefix + "first"].reshape(n_heads, -1, 1)
        heads = self.model.scratch.view("heads", x.shape[0])
        memory = state.arrays["memory"][layer]
        for t in range(x.shape[0]):
            r, k, v = (projected[name][t] for name in "rkv")
            self.recall(memory, first, decay, r, k, v, heads[t])
        self.head_norm(prefix, heads)
        if "g" in projected:
            gate = projected["g"]
            self.model.kernels.activate("silu", gate, None, gate)
            heads *= gate
        self.model.linear(prefix + "o", heads, out)

    def recall(self, memory, first, decay, r, k, v, out) -> None:
        """One token: `out` [n] from the memory, which then takes it in; sums run over keys."""
        n_heads, d = self._heads
        product, term = self._work
        np.multiply(k.reshape(n_heads, d, 1), v.reshape(n_heads, 1, d), out=product)
        np.multiply(product, first, out=term)
        term += memory
        term *= r.reshape(n_heads, d, 1)
        np.add.reduce(term, axis=1, out=out.reshape(n_heads, d))
        memory *= decay
        memory += product
