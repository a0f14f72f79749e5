"""What a version's time-mix is to the model, and the pointwise functions the recurrences share.

Everything that is not an addition or a multiplication works row by row: vector libraries may treat
the tail of an array by other instructions than its body, and a row must not notice its chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from .rwkv_config import RANKS


class TimeMix(ABC):
    """The time-mix of one version over one model's planes; holds scratch, no state of a sequence.

    `forward` turns normed x [T, hidden_size] and each token's predecessor into `out`, taking the
    layer's memory in `state.arrays` along token by token.
    """

    empty: ClassVar[dict[str, float]] = {}  # value of state arrays that do not start at zero
    n_work: ClassVar[int] = 2  # buffers of a layer's memory's size

    def __init__(self, model):
        self.model, self.config = model, model.config
        d = self.config.head_dim
        shape = self.memory_shapes(self.config)["memory"]
        self._work = [np.empty(shape, np.float32) for _ in range(self.n_work)]
        for buffer in self._work:
            buffer.fill(0)  # touched now, not in mid-sentence
        self._heads = (self.config.n_heads, d)
        self._ones, self._zeros = np.ones(d, np.float32), np.zeros(d, np.float32)

    @classmethod
    def memory_shapes(cls, config) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what one layer remembers: per head keys down, values across."""
        return {"memory": (config.n_heads, config.head_dim, config.head_dim)}

    @classmethod
    def work_bytes(cls, config) -> int:
        return cls.n_work * 4 * int(np.prod(cls.memory_shapes(config)["memory"]))

    @classmethod
    def widths(cls, config) -> dict[str, int]:
        """Scratch beside the model's own, float32 per token; "low" holds any low-rank product."""
        widths = {name: config.hidden_size for name in ("r", "k", "v", "heads")}
        ranks = max(getattr(config, name) for name in RANKS)
        return widths | ({"low": max(ranks, 5 * config.mix_rank)} if ranks else {})

    @abstractmethod
    def planes(self, layer: int) -> tuple[str, ...]:
        """Last names of the planes in the order `forward` walks them."""

    @abstractmethod
    def forward(self, layer: int, x, before, state, out) -> None: ...

    def project(self, prefix: str, name: str, x, before) -> np.ndarray:
        """The scratch buffer `name`, filled with its matrix applied to its own mix."""
        model, n_tokens = self.model, x.shape[0]
        mixed = model.mix(x, before, f"{prefix}mix_{name}", model.scratch.view("mixed", n_tokens))
        return self.linear(prefix, name, mixed)

    def linear(self, prefix: str, name: str, x: np.ndarray, into: str = "") -> np.ndarray:
        out = self.model.scratch.view(into or name, x.shape[0])
        self.model.linear(prefix + name, x, out)
        return out

    def low_rank(self, plane: str, x: np.ndarray, rank: int) -> np.ndarray:
        out = self.model.scratch.view("low", x.shape[0], rank)
        self.model.linear(plane, x, out)
        return out

    def head_norm(self, prefix: str, x: np.ndarray) -> None:
        """Each head of x [T, n] normed alone, then weight and bias over all channels."""
        heads = x.reshape(-1, self.config.head_dim)
        eps = self.config.group_norm_eps
        self.model.kernels.layer_norm(heads, self._ones, self._zeros, eps, heads)
        x *= self.model.vectors[prefix + "head_norm.weight"]
        x += self.model.vectors[prefix + "head_norm.bias"]


def sigmoid(x: np.ndarray) -> None:
    """1 / (1 + exp(-x)) in place, row by row."""
    with np.errstate(over="ignore"):
        for row in x:
            np.negative(row, out=row)
            np.exp(row, out=row)
            row += 1
            np.reciprocal(row, out=row)


def tanh(x: np.ndarray) -> None:
    """In place, row by row."""
    for row in x:
        np.tanh(row, out=row)
