"""RWKV-6's time-mix ("Finch", arXiv 2404.05892): RWKV-5's, mixing and decay depending on the token.

Five low-rank functions of one mix say how much of the token before goes into w, k, v, r and g; w is
then the input of a low-rank function that gives this token's decay, exp(-exp(.)), key by key.
"""

from __future__ import annotations

import numpy as np

from .rwkv5 import TimeMix5
from .rwkv_config import MIXED
from .rwkv_mix import tanh

_PROJECTED = "kvrg"


class TimeMix6(TimeMix5):
    @classmethod
    def widths(cls, config) -> dict[str, int]:
        more = (*(f"mixed_{name}" for name in MIXED["6"]), "decay", "delta")
        return super().widths(config) | {name: config.hidden_size for name in more}

    def planes(self, layer: int) -> tuple[str, ...]:
        mixes = tuple(f"mix2_{name}" for name in MIXED["6"])
        return ("mix1", *mixes, "decay1", "decay2", *_PROJECTED, "o")

    def forward(self, layer: int, x, before, state, out) -> None:
        prefix, model, n_tokens = f"layers.{layer}.", self.model, x.shape[0]
        mixed = self._mixes(prefix, x, before)
        decay = self._decays(prefix, mixed["w"])
        projected = {name: self.linear(prefix, name, mixed[name]) for name in _PROJECTED}
        n_heads, d = self._heads
        first = model.vectors[prefix + "first"].reshape(n_heads, d, 1)
        heads, memory = model.scratch.view("heads", n_tokens), state.arrays["memory"][layer]
        for t in range(n_tokens):
            r, k, v = (projected[name][t] for name in "rkv")
            self.recall(memory, first, decay[t].reshape(n_heads, d, 1), r, k, v, heads[t])
        self.head_norm(prefix, heads)
        gate = projected["g"]
        model.kernels.activate("silu", gate, None, gate)
        heads *= gate
        model.linear(prefix + "o", heads, out)

    def _mixes(self, prefix: str, x, before) -> dict[str, np.ndarray]:
        """The inputs of w, k, v, r and g: x + (before - x) * (vector + low-rank function)."""
        model, n_tokens, rank = self.model, x.shape[0], self.config.mix_rank
        mixed = model.mix(x, before, prefix + "mix_x", model.scratch.view("mixed", n_tokens))
        low = self.low_rank(prefix + "mix1", mixed, 5 * rank)
        tanh(low)
        delta = model.scratch.view("delta", n_tokens)
        np.subtract(before, x, out=delta)
        found = {}
        for i, name in enumerate(MIXED["6"]):
            part = np.ascontiguousarray(low[:, i * rank : (i + 1) * rank])
            share = self.linear(prefix, f"mix2_{name}", part, into=f"mixed_{name}")
            share += model.vectors[f"{prefix}mix_{name}"]
            share *= delta
            share += x
            found[name] = share
        return found

    def _decays(self, prefix: str, x: np.ndarray) -> np.ndarray:
        """exp(-exp(bias + low-rank function)): what of the memory stays, [T, n]."""
        low = self.low_rank(prefix + "decay1", x, self.config.decay_rank)
        tanh(low)
        decay = self.linear(prefix, "decay2", low, into="decay")
        decay += self.model.vectors[prefix + "decay"]
        with np.errstate(over="ignore"):
            for row in decay:
                np.exp(row, out=row)
                np.negative(row, out=row)
                np.exp(row, out=row)
        return decay
