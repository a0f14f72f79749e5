"""RWKV-7's time-mix ("Goose", arXiv 2503.14456): a memory that unlearns what it replaces.

Per token and head, with memory S [keys, values], unit key u and rate a:
S = decay * S - (a * u) (u S) + k v, out = r S + (r . (bonus * k)) v; decay, a, the gate and the
share of the first layer's value come from low-rank functions of the token.
"""

from __future__ import annotations

import numpy as np

from .rwkv_config import MIXED
from .rwkv_mix import TimeMix, sigmoid, tanh

_DECAY = np.float32(-0.606531)  # -exp(-0.5): a decay is never below exp of it
_LEAST_NORM = np.float32(1e-12)


class TimeMix7(TimeMix):
    @classmethod
    def widths(cls, config) -> dict[str, int]:
        more = ("decay", "rate", "unit", "first_v", "share", "g", "delta")
        return super().widths(config) | {name: config.hidden_size for name in more}

    def planes(self, layer: int) -> tuple[str, ...]:
        residual = ("value1", "value2") if layer else ()
        return (
            "r", "decay1", "decay2", "k", "v", *residual, "rate1", "rate2", "gate1", "gate2", "o"
        )  # fmt: skip

    def forward(self, layer: int, x, before, state, out) -> None:
        prefix, model, n_tokens = f"layers.{layer}.", self.model, x.shape[0]
        delta = np.subtract(before, x, out=model.scratch.view("delta", n_tokens))
        r = self.linear(prefix, "r", self._mixed(prefix, "r", x, delta))
        decay = self._decays(prefix, self._mixed(prefix, "w", x, delta))
        k = self.linear(prefix, "k", self._mixed(prefix, "k", x, delta))
        v = self._values(layer, prefix, self._mixed(prefix, "v", x, delta))
        rate = self._function(prefix, "rate", self._mixed(prefix, "a", x, delta), "rate")
        sigmoid(rate)
        mixed = self._mixed(prefix, "g", x, delta)
        low = self.low_rank(prefix + "gate1", mixed, self.config.gate_rank)
        sigmoid(low)
        gate = self.linear(prefix, "gate2", low, into="g")
        heads, unit = (model.scratch.view(name, n_tokens) for name in ("heads", "unit"))
        self._keys(prefix, k, rate, unit)
        memory = state.arrays["memory"][layer]
        for t in range(n_tokens):
            self._recall(memory, decay[t], r[t], k[t], v[t], unit[t], rate[t], heads[t])
        self.head_norm(prefix, heads)
        self._add_bonus(prefix, r, k, v, heads)
        heads *= gate
        model.linear(prefix + "o", heads, out)

    def _mixed(self, prefix: str, name: str, x, delta) -> np.ndarray:
        at, h = MIXED["7"].index(name), self.config.hidden_size
        out = self.model.scratch.view("mixed", x.shape[0])
        share = self.model.vectors[prefix + "mix"][at * h : (at + 1) * h]
        np.multiply(delta, share, out=out)
        out += x
        return out

    def _function(self, prefix: str, name: str, x, into: str, *, middle=None) -> np.ndarray:
        """bias + second (middle(first x))."""
        low = self.low_rank(f"{prefix}{name}1", x, getattr(self.config, f"{name}_rank"))
        if middle is not None:
            middle(low)
        out = self.linear(prefix, f"{name}2", low, into=into)
        out += self.model.vectors[f"{prefix}{name}0"]
        return out

    def _decays(self, prefix: str, x) -> np.ndarray:
        decay = self._function(prefix, "decay", x, "decay", middle=tanh)
        sigmoid(decay)
        decay *= _DECAY
        for row in decay:
            np.exp(row, out=row)
        return decay

    def _values(self, layer: int, prefix: str, x) -> np.ndarray:
        """This layer's values, drawn towards the first layer's."""
        v = self.linear(prefix, "v", x)
        first = self.model.scratch.view("first_v", x.shape[0])
        if layer == 0:
            np.copyto(first, v)
            return v
        share = self._function(prefix, "value", x, "share")
        sigmoid(share)
        towards = first - v
        towards *= share
        v += towards
        return v

    def _keys(self, prefix: str, k, rate, unit) -> None:
        """`unit`: keys of length 1 per head; k scaled by the rate; in place."""
        vectors = self.model.vectors
        np.multiply(k, vectors[prefix + "k_k"], out=unit)
        for t in range(k.shape[0]):
            heads = unit[t].reshape(self._heads)
            length = np.sqrt(np.add.reduce(heads * heads, axis=1, keepdims=True))
            heads /= np.maximum(length, _LEAST_NORM)
            scale = rate[t] - np.float32(1)
            scale *= vectors[prefix + "k_a"]
            scale += np.float32(1)
            k[t] *= scale

    def _recall(self, memory, decay, r, k, v, unit, rate, out) -> None:
        """One token; sums run over keys in ascending order."""
        n_heads, d = self._heads
        term, _ = self._work
        down, across = (n_heads, d, 1), (n_heads, 1, d)
        np.multiply(memory, unit.reshape(down), out=term)
        found = np.add.reduce(term, axis=1)  # what the memory holds under this key
        memory *= decay.reshape(down)
        np.multiply((unit * rate).reshape(down), found.reshape(across), out=term)
        memory -= term
        np.multiply(k.reshape(down), v.reshape(across), out=term)
        memory += term
        np.multiply(memory, r.reshape(down), out=term)
        np.add.reduce(term, axis=1, out=out.reshape(n_heads, d))

    def _add_bonus(self, prefix: str, r, k, v, heads) -> None:
        bonus = self.model.vectors[prefix + "bonus"]
        for t in range(r.shape[0]):
            share = (r[t] * k[t] * bonus).reshape(self._heads)
            total = np.add.reduce(share, axis=1, keepdims=True)
            heads[t] += (total * v[t].reshape(self._heads)).reshape(-1)
