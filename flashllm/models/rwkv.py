"""RWKV: a recurrent language model; what all versions share, and the order of a layer.

A layer is x += time_mix(norm(x)), x += channel_mix(norm(x)); both see the token before through a
shift.  Matrices are applied to a whole chunk; the recurrence takes token after token in one call,
so that a chunk has the bits of its tokens one by one (docs/ARITHMETIC.md).  What a version's
time-mix is lies in rwkv4.py, rwkv5.py, rwkv6.py, rwkv7.py.
Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048.
"""

from __future__ import annotations

import numpy as np

from .decoder import DecoderModel
from .rwkv4 import TimeMix4
from .rwkv5 import TimeMix5
from .rwkv6 import TimeMix6
from .rwkv7 import TimeMix7
from .rwkv_mix import Shift, TimeMix
from .state import RecurrentState, StateGroup

TIME_MIXES: dict[str, type[TimeMix]] = {
    "4": TimeMix4, "5.1": TimeMix5, "5.2": TimeMix5, "6": TimeMix6, "7": TimeMix7
}  # fmt: skip


class RWKVModel(DecoderModel):
    bounded_context = False

    def __init__(self, config, planes, vectors, store, kernels, *, max_tokens, n_context, path=""):
        super().__init__(
            config, planes, vectors, store, kernels, max_tokens=max_tokens, n_context=n_context
        )
        self.time_mix = TIME_MIXES[config.version](self)

    # -- sizes

    @classmethod
    def scratch_widths(cls, config) -> dict[str, int]:
        h, n = config.hidden_size, config.intermediate_size
        widths = {name: h for name in ("x", "normed", "residual", "gate")}
        return widths | {"decided": n, "gathered": n} | TIME_MIXES[config.version].widths(config)

    @classmethod
    def widest_input(cls, config) -> int:
        return max(config.hidden_size, *TIME_MIXES[config.version].widths(config).values())

    @classmethod
    def state_bytes(cls, config, n_context: int, dtype: np.dtype) -> int:
        return RecurrentState.bytes_needed(_state_shapes(config))

    @classmethod
    def mark_bytes(cls, config) -> int:
        return RecurrentState.bytes_needed(_state_shapes(config))

    @classmethod
    def context_bytes(cls, config, n_context: int, dtype: np.dtype, kernels) -> int:
        spread = TIME_MIXES[config.version].vector_bytes(config)
        return cls.state_bytes(config, n_context, dtype) + spread

    def new_state(
        self, n_context: int, dtype: np.dtype, held: int | None = None
    ) -> RecurrentState:
        """`dtype` and `held` are for what grows; a recurrent state is float32 always."""
        empty = TIME_MIXES[self.config.version].empty
        return RecurrentState(_state_shapes(self.config), empty=empty, capacity=n_context)

    def layer_planes(self, layer: int) -> tuple[str, ...]:
        channel = ("receptance",) if self.config.has_receptance else ()
        before = tuple(f"layers.{layer}.{n}" for n in (*self.time_mix.planes(layer), *channel))
        return before + self.ffn_planes(layer)

    # -- the pass

    def _hidden(self, ids: np.ndarray, state: RecurrentState | StateGroup) -> np.ndarray:
        n_tokens, view = ids.size, self.scratch.view
        x, normed, residual = (view(name, n_tokens) for name in ("x", "normed", "residual"))
        self.embed("embed", ids, x)
        self.layer_norm(x, "embed_norm", x)
        for layer in range(self.config.n_layers):
            prefix = f"layers.{layer}."
            self.layer_norm(x, prefix + "att_norm", normed)
            before = Shift(state, "time_shift", layer)
            self.time_mix.forward(layer, normed, before, state, residual)
            before.keep(normed)
            x += residual
            self.layer_norm(x, prefix + "ffn_norm", normed)
            before = Shift(state, "channel_shift", layer)
            self._channel_mix(layer, normed, before, residual)
            before.keep(normed)
            x += residual
        return x

    def _channel_mix(self, layer: int, x: np.ndarray, before: Shift, out: np.ndarray) -> None:
        prefix, gated = f"layers.{layer}.", self.config.has_receptance
        names = ("channel_mix_k", "channel_mix_r") if gated else ("channel_mix_k",)
        shares = tuple(self.vectors[prefix + name] for name in names)
        mixed = self.time_mix.mix(x, before, shares)
        gate = None
        if gated:
            gate = self.scratch.view("gate", x.shape[0])
            self.linear(prefix + "receptance", mixed[1], gate)
        self.ffn(layer, mixed[0], out)
        if gate is not None:
            self.kernels.activate("sigmoid", gate, out, out)

    def _logits(self, hidden: np.ndarray, out: np.ndarray) -> None:
        normed = self.scratch.view("normed", hidden.shape[0])
        self.layer_norm(hidden, "final_norm", normed)
        self.linear("head", normed, out)


def _state_shapes(config) -> dict[str, tuple[int, ...]]:
    shift = {"time_shift": (config.hidden_size,), "channel_shift": (config.hidden_size,)}
    memory = TIME_MIXES[config.version].memory_shapes(config)
    return {name: (config.n_layers, *shape) for name, shape in (shift | memory).items()}
