"""RWKV-7's time-mix ("Goose", arXiv 2503.14456): a memory that unlearns what it replaces.

Per token and head, with memory S [keys, values], unit key u and rate a:
S = decay * S - (a * u) (u S) + k v, out = r S + (r . (bonus * k)) v; decay, a, the gate and the
share of the first layer's value come from low-rank functions of the token.
"""

from __future__ import annotations

import numpy as np

from ..kernels.recurrent import VECTORS_7
from .rwkv_config import MIXED
from .rwkv_mix import TimeMix, memories


class TimeMix7(TimeMix):
    share = "past"
    vector_names = VECTORS_7

    def _shares(self, prefix: str) -> tuple[np.ndarray, ...]:
        return tuple(self.model.vectors[prefix + "mix"].reshape(len(MIXED["7"]), -1))

    @classmethod
    def widths(cls, config) -> dict[str, int]:
        more = ("decay", "rate", "first_v", "share", "gate")
        return super().widths(config) | {name: config.hidden_size for name in more}

    def planes(self, layer: int) -> tuple[str, ...]:
        residual = ("value1", "value2") if layer else ()
        return (
            "r", "decay1", "decay2", "k", "v", *residual, "rate1", "rate2", "gate1", "gate2", "o"
        )  # fmt: skip

    def forward(self, layer: int, x, before, state, out) -> None:
        mixed = dict(zip(MIXED["7"], self.mix(x, before, self.shares[layer]), strict=True))
        tokens = {"r": self.linear(layer, "r", mixed["r"])}
        tokens["decay"] = self._function(layer, "decay", mixed["w"], "tanh")
        tokens["k"] = self.linear(layer, "k", mixed["k"])
        tokens["v"] = self.linear(layer, "v", mixed["v"])
        tokens["first_v"] = self.model.scratch.view("first_v", x.shape[0])
        if layer:
            tokens["share"] = self._function(layer, "value", mixed["v"], into="share")
        tokens["rate"] = self._function(layer, "rate", mixed["a"])
        tokens["gate"] = self._function(layer, "gate", mixed["g"], "sigmoid")
        heads = self.model.scratch.view("heads", x.shape[0])
        for t, kept in memories(state, layer, x.shape[0]):
            self.kernels.rwkv7(
                {name: rows[t] for name, rows in tokens.items()}, self.vectors[layer],
                self.config.group_norm_eps, kept["memory"], heads[t],
            )  # fmt: skip
        self.model.linear(f"layers.{layer}.o", heads, out)

    def _function(self, layer: int, name: str, x, activation="", into: str = "") -> np.ndarray:
        """second (activation (first x)), before any bias."""
        low = self.low_rank(layer, f"{name}1", x, getattr(self.config, f"{name}_rank"), activation)
        return self.linear(layer, f"{name}2", low, into=into or name)
