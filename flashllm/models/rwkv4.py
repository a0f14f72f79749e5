"""RWKV-4's time-mix: an exponentially decayed average of values, channel by channel.

memory[0] and memory[1] are numerator and denominator, both divided by exp(exponent), the largest
so far, so that no exponential overflows (arXiv 2305.13048, appendix D).
"""

from __future__ import annotations

import numpy as np

from .rwkv_mix import TimeMix, sigmoid


class TimeMix4(TimeMix):
    empty = {"exponent": -1e30}
    n_work = 0

    @classmethod
    def memory_shapes(cls, config) -> dict[str, tuple[int, ...]]:
        return {"memory": (2, config.hidden_size), "exponent": (config.hidden_size,)}

    def planes(self, layer: int) -> tuple[str, ...]:
        return ("r", "k", "v", "o")

    def forward(self, layer: int, x, before, state, out) -> None:
        prefix, vectors = f"layers.{layer}.", self.model.vectors
        r, k, v = (self.project(prefix, name, x, before) for name in "rkv")
        sigmoid(r)
        decay, first = vectors[prefix + "decay"], vectors[prefix + "first"]
        memory, exponent = state.arrays["memory"][layer], state.arrays["exponent"][layer]
        for t in range(x.shape[0]):
            r[t] *= _average(memory, exponent, first, k[t], v[t])
            _remember(memory, exponent, decay, k[t], v[t])
        self.model.linear(prefix + "o", r, out)


def _average(memory, exponent, first, k, v) -> np.ndarray:
    """What the memory and this token, weighted by `first`, say together."""
    weight = first + k
    largest = np.maximum(exponent, weight)
    old, new = np.exp(exponent - largest), np.exp(weight - largest)
    return (old * memory[0] + new * v) / (old * memory[1] + new)


def _remember(memory, exponent, decay, k, v) -> None:
    faded = exponent + decay
    largest = np.maximum(faded, k)
    old, new = np.exp(faded - largest), np.exp(k - largest)
    memory *= old
    memory[0] += new * v
    memory[1] += new
    exponent[:] = largest
