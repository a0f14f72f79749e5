"""What a version's time-mix is to the model, and what all of them do alike.

The mixes with the token before, the recurrence and everything pointwise around it are operators of
the kernel set (kernels/recurrent.py); between them are the matrices, a whole chunk at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from .rwkv_config import MIXED, RANKS

SHIFTS = ("time_shift", "channel_shift")  # arrays of a state that Shift looks after


class Shift:
    """What a layer remembers of the token before: the row `name` of its sequences' arrays."""

    def __init__(self, state, name: str, layer: int):
        self._state, self._name, self._layer = state, name, layer

    def of(self, n_tokens: int) -> list[tuple[slice, np.ndarray]]:
        """(rows, the token [hidden_size] before the first of them), sequence by sequence."""
        spans = self._state.spans(n_tokens)
        return [(rows, one.arrays[self._name][self._layer]) for rows, one in spans]

    def keep(self, x: np.ndarray) -> None:
        """Remember the last row of each sequence."""
        for rows, one in self._state.spans(x.shape[0]):
            one.arrays[self._name][self._layer] = x[rows.stop - 1]
            for i in range(one.n_marked):
                one.keep(self._name, self._layer, i, x[rows.start + i])


def memories(state, layer: int, n_tokens: int) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
    """(rows, the layer's arrays that take them in), sequence by sequence; token by token where
    the state is to remember what it held in between."""
    for rows, one in state.spans(n_tokens):
        kept = {name: array[layer] for name, array in one.arrays.items()}
        if not one.n_marked:
            yield rows, kept
        for i in range(one.n_marked):
            yield slice(rows.start + i, rows.start + i + 1), kept
            for name in kept.keys() - set(SHIFTS):
                one.keep(name, layer, i, kept[name])


class TimeMix(ABC):
    """The time-mix of one version over one model's planes; holds no state of a sequence.

    `forward` turns normed x [T, hidden_size] into `out`, taking the layer's memory in
    `state.arrays` along token by token; `before` knows the tokens before.
    """

    empty: ClassVar[dict[str, float]] = {}  # value of state arrays that do not start at zero
    share: ClassVar[str] = "now"  # whose share the mixing vectors give
    vector_names: ClassVar[tuple[str, ...]] = ()  # of a layer, handed to the recurrence

    def __init__(self, model):
        self.model, self.config, self.kernels = model, model.config, model.kernels
        layers = range(self.config.n_layers)
        self.vectors = [self._layer_vectors(f"layers.{i}.") for i in layers]
        self.shares = [self._shares(f"layers.{i}.") for i in layers]

    def _layer_vectors(self, prefix: str) -> dict[str, np.ndarray]:
        vectors = self.model.vectors
        return {name: vectors[prefix + name] for name in self.vector_names
                if prefix + name in vectors}  # fmt: skip

    def _shares(self, prefix: str) -> tuple[np.ndarray, ...]:
        """The mixing vectors of a layer in the order of MIXED."""
        return tuple(self.model.vectors[f"{prefix}mix_{x}"] for x in MIXED[self.config.version])

    @classmethod
    def memory_shapes(cls, config) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what one layer remembers: per head keys down, values across."""
        return {"memory": (config.n_heads, config.head_dim, config.head_dim)}

    @classmethod
    def vector_bytes(cls, config) -> int:
        """Bytes of vectors that are kept beside those of the file."""
        return 0

    @classmethod
    def widths(cls, config) -> dict[str, int]:
        """Scratch beside the model's own, float32 per token; "low" holds any low-rank product."""
        widths = {name: config.hidden_size for name in ("r", "k", "v", "heads")}
        widths["mixed"] = len(MIXED[config.version]) * config.hidden_size
        ranks = max(getattr(config, name) for name in RANKS)
        return widths | ({"low": max(ranks, 5 * config.mix_rank)} if ranks else {})

    @abstractmethod
    def planes(self, layer: int) -> tuple[str, ...]:
        """Last names of the planes in the order `forward` walks them."""

    @abstractmethod
    def forward(self, layer: int, x, before: Shift, state, out) -> None: ...

    def mix(
        self, x, before: Shift, shares: tuple[np.ndarray, ...], *, plus: bool = False
    ) -> np.ndarray:
        """Mixes [len(shares), T, n] of each token with the one before, in the scratch "mixed".

        `plus`: what lies there already is added to the shares.
        """
        n_tokens, n = x.shape
        mixed = self.model.scratch.view("mixed", n_tokens, len(shares) * n)
        mixed = mixed.reshape(len(shares), n_tokens, n)
        kind = self.share + " plus" * plus
        for rows, last in before.of(n_tokens):
            whole = rows.stop - rows.start == n_tokens
            part = mixed if whole else np.ascontiguousarray(mixed[:, rows])
            self.kernels.mix_tokens(kind, x[rows], last, shares, part)
            if not whole:
                mixed[:, rows] = part
        return mixed

    def projections(self, layer: int, x, before: Shift, names: str) -> dict[str, np.ndarray]:
        """name -> its matrix applied to its own mix; `names` are those of MIXED, in any order."""
        mixed = self.mix(x, before, self.shares[layer])
        order = MIXED[self.config.version]
        return {name: self.linear(layer, name, mixed[order.index(name)]) for name in names}

    def linear(self, layer: int, plane: str, x: np.ndarray, into: str = "") -> np.ndarray:
        """The scratch `into`, or one called as the plane, filled with the plane's matrix of x."""
        out = self.model.scratch.view(into or plane, x.shape[0])
        self.model.linear(f"layers.{layer}.{plane}", x, out)
        return out

    def low_rank(
        self, layer: int, plane: str, x: np.ndarray, rank: int, activation: str = ""
    ) -> np.ndarray:
        """The scratch "low" [T, rank], filled likewise; then activated, where one is named."""
        out = self.model.scratch.view("low", x.shape[0], rank)
        self.model.linear(f"layers.{layer}.{plane}", x, out)
        if activation:
            self.kernels.activate(activation, out, None, out)
        return out
