"""RWKV-4's time-mix: an exponentially decayed average of values, channel by channel.

memory[0] and memory[1] are numerator and denominator, both divided by exp(exponent), the largest
so far, so that no exponential overflows (arXiv 2305.13048, appendix D).
"""

from __future__ import annotations

from .rwkv_mix import TimeMix, memories


class TimeMix4(TimeMix):
    empty = {"exponent": -1e30}
    vector_names = ("decay", "first")

    @classmethod
    def memory_shapes(cls, config) -> dict[str, tuple[int, ...]]:
        return {"memory": (2, config.hidden_size), "exponent": (config.hidden_size,)}

    def planes(self, layer: int) -> tuple[str, ...]:
        return ("r", "k", "v", "o")

    def forward(self, layer: int, x, before, state, out) -> None:
        r, k, v = self.projections(layer, x, before, "rkv").values()
        vectors = self.vectors[layer]
        for t, kept in memories(state, layer, x.shape[0]):
            self.kernels.rwkv4(
                r[t], k[t], v[t], vectors["decay"], vectors["first"],
                kept["memory"], kept["exponent"], r[t],
            )  # fmt: skip
        self.model.linear(f"layers.{layer}.o", r, out)
