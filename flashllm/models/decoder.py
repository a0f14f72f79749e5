"""What decoder-only transformers share: linear maps over planes and attention; the FFNs are in
ffn.py.

A family file says in which order these are called and with which norms.  Nothing here knows where
a weight lies: planes come from the store as leases, in ascending order, and the kernels' canonical
order does the rest, so that streamed equals resident bit for bit (docs/ARITHMETIC.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

from ..errors import FormatError
from ..kernels.base import ATTENTION, HEAD, PHASES, PieceView, weight_code
from .ffn import FeedForward, Observer, StepCounts
from .scratch import Scratch
from .state import KVCache, SequenceState, StateGroup


class DecoderModel(FeedForward, ABC):
    """A decoder-only language model whose weights come from a store.

    `config` is the family's normalised configuration, `planes` the container's table of planes,
    `vectors` its float32 1-D tensors, `store` a WeightStore, `kernels` a kernel set.  One model
    object serves one sequence at a time; `forward` must not be called from two threads.  `observer`
    is None, which costs nothing, or sees what each sparse layer decides.  `approximation` is None
    or says what decoding steps leave out.
    """

    def __init__(
        self, config, planes, vectors, store, kernels, *, max_tokens: int, n_context: int
    ):  # fmt: skip
        self.config, self.planes, self.vectors = config, planes, vectors
        self.store, self.kernels = store, kernels
        self.clock = kernels.clock
        self.max_tokens = max_tokens
        self.scratch = Scratch(self.scratch_widths(config), max_tokens)
        self.activations = kernels.activations(max_tokens, self._widest(config))
        self.views = {
            name: {piece.name: _piece_view(plane, piece) for piece in plane.pieces}
            for name, plane in planes.items()
        }
        # Layers ("layers.0.") whose gate or up rows have biases.
        self._inner_biases = {
            name.removesuffix(last)
            for name in vectors for last in ("gate.bias", "up.bias") if name.endswith("." + last)
        }  # fmt: skip
        self._ids, self._active_ids = np.zeros((2, config.intermediate_size), np.int32)
        # Neurons that begin_ffn has chosen and that were added; the last is no layer's.
        self._chosen, self._added = np.zeros((2, config.n_layers + 1), np.int64)
        # Of `streamed_ffn`: by layer its call, and the ids that it was recorded with.
        self._add_calls: dict[int, tuple[Any, np.ndarray]] = {}
        self._paired: dict[str, tuple[PieceView, np.ndarray] | None] = {}
        self.counts = StepCounts()
        self.observer: Observer | None = None
        self._decoding = False  # this pass

    phases: ClassVar[tuple[str, ...]] = PHASES  # of clock.spent()

    @classmethod
    def chunk_bytes(cls, config, n: int, kernels, embed_stride: int) -> int:
        """What a pass of n tokens works in."""
        return (Scratch.bytes_needed(cls.scratch_widths(config), n)
                + kernels.activation_bytes(n, cls._widest(config))
                + n * embed_stride + 4 * config.hidden_size * n)  # fmt: skip

    # -- what a family says about itself

    @classmethod
    @abstractmethod
    def scratch_widths(cls, config) -> dict[str, int]:
        """Name -> width of every buffer that `forward` uses, in float32 per token."""

    @classmethod
    @abstractmethod
    def widest_input(cls, config) -> int:
        """Columns of the widest matrix, which the prepared activations must hold, where a dense
        FFN lies in bundles."""

    @classmethod
    def _widest(cls, config) -> int:
        """The same wherever it lies: a down projection's rows are as wide as there are neurons."""
        return max(cls.widest_input(config), 0 if config.sparse else config.intermediate_size)

    def layer_planes(self, layer: int) -> tuple[str, ...]:
        """Planes of one layer in the order in which `forward` walks them."""
        prefix = f"layers.{layer}."
        return (prefix + "qkv", prefix + "o", *self.ffn_planes(layer))

    def ffn_planes(self, layer: int) -> tuple[str, ...]:
        """Those of its FFN."""
        prefix = f"layers.{layer}."
        by_rows = prefix + "down" in self.planes
        names = ("gate", "up", "down") if by_rows else ("deciding", "ffn")
        return tuple(prefix + name for name in names if prefix + name in self.planes)

    @abstractmethod
    def _hidden(self, ids: np.ndarray, state: SequenceState | StateGroup) -> np.ndarray:
        """Hidden states [T, hidden_size] after the last layer, before the final norm."""

    @abstractmethod
    def _logits(self, hidden: np.ndarray, out: np.ndarray) -> None:
        """Final norm and head: float32 logits [T, vocab_size] of `hidden` into `out`."""

    # -- the pass

    @property
    def head_plane(self) -> str:
        return "head" if "head" in self.planes else "embed"

    def order(self, *, with_head: bool = True) -> tuple[str, ...]:
        """Planes in the order one step walks them; the store reads ahead along it."""
        names = [name for i in range(self.config.n_layers) for name in self.layer_planes(i)]
        return tuple(names + self.head_planes()) if with_head else tuple(names)

    def head_planes(self) -> list[str]:
        return [self.head_plane]

    # False where a state does not grow with its sequence: no context is then too long.
    bounded_context: ClassVar[bool] = True

    @classmethod
    def state_bytes(cls, config, n_context: int, dtype: np.dtype) -> int:
        """What new_state(n_context, dtype) allocates."""
        return n_context * KVCache.bytes_per_token(
            n_layers=config.n_layers, n_kv_heads=config.n_kv_heads, head_dim=config.head_dim,
            dtype=dtype,
        )  # fmt: skip

    @classmethod
    def mark_bytes(cls, config) -> int:
        """What a state takes for each token that a pass may be rewound by."""
        return 0

    @classmethod
    def context_bytes(cls, config, n_context: int, dtype: np.dtype, kernels) -> int:
        """What a sequence of up to `n_context` tokens takes: state, tables, attention scratch."""
        return cls.state_bytes(config, n_context, dtype) + kernels.attention_bytes(n_context)

    def new_state(
        self, n_context: int, dtype: np.dtype, held: int | None = None
    ) -> SequenceState:
        """An empty state for up to `n_context` tokens, and what computing with it needs; at first
        there is memory for `held` of them, for all unless said."""
        c = self.config
        self.kernels.attention_scratch(n_context)
        return KVCache(
            n_layers=c.n_layers,
            n_kv_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            n_context=n_context,
            dtype=dtype,
            held=held,
        )

    def forward(
        self,
        ids: np.ndarray,
        state: SequenceState | StateGroup,
        logits: np.ndarray | None = None,
        *,
        rows: np.ndarray | None = None,
        decoding: bool = False,
    ) -> None:
        """Take int32 `ids` [T] into `state`; write the logits that are asked for into `logits`.

        `logits` is float32 [n, vocab_size] for the last n of the T tokens, or for those in `rows`
        [n], or None when nobody asks.  A group's tokens are its sequences' in turn.  `decoding`:
        these are not a prompt's; where there is an approximation it holds for a decoding step of
        one token and for nothing else.  The caller has begun the store's step with the matching
        order.
        """
        n_tokens = ids.size
        self.counts = StepCounts(n_tokens=n_tokens)
        self._decoding = decoding
        if decoding and self.approximation is not None:
            self.approximation.begin_token()
        self.clock.phase = ATTENTION
        hidden = self._hidden(ids, state)
        for span, one in state.spans(n_tokens):
            one.length += span.stop - span.start
        if logits is not None:
            self.clock.phase = HEAD
            last = hidden[n_tokens - logits.shape[0] :] if rows is None else hidden[rows]
            self._logits(np.ascontiguousarray(last), logits)

    # -- pieces

    def embed(self, plane: str, ids: np.ndarray, out: np.ndarray) -> None:
        """Rows `ids` of an embedding plane, decoded into float32 `out` [T, n]."""
        view = self.views[plane]["row"]
        if (lease := self.store.held(plane)) is not None:
            self.kernels.decode_rows(lease.addresses, view, ids, out)
            return
        stride = self.planes[plane].stride
        raw = np.empty((ids.size, stride), np.uint8)
        self.store.gather(plane, ids, raw)
        lone = PieceView(view.weight_type, 1, stride, view.offset, view.n_cols)
        addresses = raw.ctypes.data + stride * np.arange(ids.size, dtype=np.uint64)
        self.kernels.decode_rows(addresses, lone, np.arange(ids.size, dtype=np.int32), out)

    def linear(self, plane: str, x: np.ndarray, out: np.ndarray, bias: str | None = None) -> None:
        """out[T, n_rows] = x [T, n_cols] times the plane's matrix, transposed, plus its bias."""
        view, kernels, acts = self.views[plane]["row"], self.kernels, self.activations
        for lease in self.store.scan(plane):
            if lease.start == 0:
                kernels.linear(acts, x, lease.addresses, view, 0, lease.stop, out)
            else:
                kernels.dot_range(acts, lease.addresses, view, lease.start, lease.stop, out)
        if bias is not None:
            self._add_bias(bias, out)

    def _add_bias(
        self, name: str, out: np.ndarray, start: int = 0, stop: int | None = None
    ) -> None:
        """Add items start .. stop - 1 of the vector `name` to every row, if there is one."""
        bias = self.vectors.get(name)
        if bias is None:
            return
        part = bias[start:stop]
        if len(out) == 1:
            self.kernels.add(out, part[None])
        else:
            out += part

    def layer_norm(self, x: np.ndarray, name: str, out: np.ndarray) -> None:
        """LayerNorm of every row of `x` with the weight and bias of `name`."""
        weight, bias = self.vectors[name + ".weight"], self.vectors[name + ".bias"]
        self.kernels.layer_norm(x, weight, bias, self.config.norm_eps, out)

    def attend(
        self,
        layer: int,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        state: KVCache | StateGroup,
        out: np.ndarray,
        *,
        scale: float,
        window: int = 0,
        cap: float = 0.0,
    ) -> None:
        """Causal attention of q [T, n_heads, head_dim] over the cache, k and v written first."""
        for rows, one in state.spans(q.shape[0]):
            first = one.length
            one.write(layer, first, k[rows], v[rows])
            self.kernels.attention(
                q[rows], one.keys[layer], one.values[layer], first, window, scale, out[rows],
                cap=cap,
            )  # fmt: skip


def _piece_view(plane, piece) -> PieceView:
    code = weight_code(piece.weight_type)
    return PieceView(code, plane.per_frame, plane.stride, piece.offset, piece.n_cols)


def require_vector(path: object, vectors: dict[str, np.ndarray], name: str, n: int) -> np.ndarray:
    """The vector `name` of exactly `n` values, or a FormatError that says what is there."""
    if name not in vectors:
        raise FormatError(path, f"vector {name}", f"{n} values", "nothing")
    if vectors[name].shape != (n,):
        raise FormatError(path, f"vector {name}", f"shape ({n},)", vectors[name].shape)
    return vectors[name]
