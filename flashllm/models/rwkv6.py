"""RWKV-6's time-mix ("Finch", arXiv 2404.05892): RWKV-5's, mixing and decay depending on the token.

Five low-rank functions of one mix say how much of the token before goes into w, k, v, r and g; w is
then the input of a low-rank function that gives this token's decay, exp(-exp(.)), key by key.
"""

from __future__ import annotations

import numpy as np

from .rwkv5 import TimeMix5
from .rwkv_config import MIXED

_PROJECTED = "kvrg"


class TimeMix6(TimeMix5):
    share = "past"

    @classmethod
    def widths(cls, config) -> dict[str, int]:
        return super().widths(config) | {"decay": config.hidden_size}

    def planes(self, layer: int) -> tuple[str, ...]:
        mixes = tuple(f"mix2_{name}" for name in MIXED["6"])
        return ("mix1", *mixes, "decay1", "decay2", *_PROJECTED, "o")

    def forward(self, layer: int, x, before, state, out) -> None:
        mixed = dict(zip(MIXED["6"], self._mixes(layer, x, before), strict=True))
        low = self.low_rank(layer, "decay1", mixed["w"], self.config.decay_rank, "tanh")
        tokens = {"decay": self.linear(layer, "decay2", low, into="decay")}
        tokens |= {name: self.linear(layer, name, mixed[name]) for name in _PROJECTED}
        self.recall(layer, tokens, state, out)

    def _mixes(self, layer: int, x, before) -> np.ndarray:
        """The inputs of w, k, v, r and g: x + (before - x) * (vector + low-rank function)."""
        model, rank, shares = self.model, self.config.mix_rank, self.shares[layer]
        mixed = self.mix(x, before, (model.vectors[f"layers.{layer}.mix_x"],))[0]
        low = self.low_rank(layer, "mix1", mixed, 5 * rank, "tanh")
        n_tokens, n = x.shape
        found = model.scratch.view("mixed", n_tokens, len(shares) * n)
        found = found.reshape(len(shares), n_tokens, n)
        for i, name in enumerate(MIXED["6"]):
            part = np.ascontiguousarray(low[:, i * rank : (i + 1) * rank])
            model.linear(f"layers.{layer}.mix2_{name}", part, found[i])
        return self.mix(x, before, shares, plus=True)
