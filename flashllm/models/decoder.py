"""What decoder-only transformers share: linear maps over planes, attention, and the FFNs.

A family file says in which order these are called and with which norms.  Nothing here knows where
a weight lies: planes come from the store as leases, in ascending order, and the kernels' canonical
order does the rest, so that streamed equals resident bit for bit (docs/ARITHMETIC.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..errors import FormatError
from ..kernels.base import ATTENTION, FFN, HEAD, PHASES, PREDICT, PieceView, weight_code
from ..predictors import Predictor
from ..predictors.scores import FittedPredictor
from .approximate import ApproximateFFN, PredictedCounts
from .scratch import Scratch
from .state import KVCache, SequenceState, StateGroup


@dataclass
class StepCounts:
    """What one forward pass found out: per sparse layer, active neurons and how many there are.

    `active_bundles` counts the union over the tokens of the chunk, `active_neurons` the sum over
    tokens (so active_neurons / (n_tokens * n_neurons) is the share per token).
    """

    n_tokens: int = 0
    active_neurons: int = 0
    active_bundles: int = 0
    n_neurons: int = 0
    layers: dict[int, int] = field(default_factory=dict)
    predicted: PredictedCounts = field(default_factory=PredictedCounts)


# Called in every sparse FFN as observer(layer, x, decided): the input float32 [T, hidden_size] and
# the deciding pre-activations float32 [T, n_neurons] of the T tokens of this pass, in prefill as in
# decoding; active is what is above zero.  A layer of routed experts shows 1 for those that a token
# was sent to and 0 for the others, [T, n_experts].  Both are scratch: valid during the call, not to
# be kept.
Observer = Callable[[int, np.ndarray, np.ndarray], None]


class DecoderModel(ApproximateFFN, ABC):
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
        # Neurons chosen and added in each layer's `whole_ffn`; the last is no layer's.
        self._chosen, self._added = np.zeros((2, config.n_layers + 1), np.int64)
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
        stride = self.planes[plane].stride
        raw = np.empty((ids.size, stride), np.uint8)
        self.store.gather(plane, ids, raw)
        view = self.views[plane]["row"]
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

    @property
    def _approximating(self) -> bool:
        """Whether this pass leaves out what the approximation says."""
        return self._decoding and self.approximation is not None

    def predictor_of(self, layer: int) -> Predictor | None:
        """Who says which of the layer's neurons this pass computes, if a predictor does."""
        return self.approximation.predictors.get(layer) if self._approximating else None

    def ffn_begins(self, layer: int) -> bool:
        """Whether one token's FFN begins with operators alone, on arrays in memory: `begin_ffn`."""
        if (predictor := self.predictor_of(layer)) is not None:
            return isinstance(predictor, FittedPredictor)
        if self._approximating and layer in self.approximation.thresholds:
            return False
        held = self.store.held(f"layers.{layer}.deciding") is not None
        return self.config.sparse and held and self.observer is None

    def begin_ffn(self, layer: int, x: np.ndarray, out: np.ndarray) -> None:
        """Where `ffn_begins`: what decides which neurons one token computes, and an empty sum.  The
        rest of it is `ffn` with `begun`."""
        if self.predictor_of(layer) is not None:
            self.begin_approximate(layer, x, out)
        else:
            self._begin_sparse(layer, x, out)

    def begun(self) -> list[np.ndarray]:
        """Arrays that `begin_ffn` fills, beside its `out`."""
        arrays = [self.scratch.view("decided", 1)]
        fitted = self.approximation.predictors.values() if self.approximation is not None else ()
        return arrays + [p.scratch.raw for p in fitted if isinstance(p, FittedPredictor)][:1]

    def ffn(self, layer: int, x: np.ndarray, out: np.ndarray, *, begun: bool = False) -> None:
        """The layer's FFN of normed x [T, hidden_size] into `out`, biases included.

        The bits do not depend on where in the container a neuron's pieces lie; those of an FFN by
        rows are others (docs/ARITHMETIC.md).
        """
        if self._approximating and self.approximate_ffn(layer, x, out, begun):
            return
        apart = f"layers.{layer}.deciding" in self.planes
        if self.config.sparse and apart:
            self.sparse_ffn(layer, x, out, begun=begun)
        elif self.config.sparse:
            self.bundled_ffn(layer, x, out)
        elif f"layers.{layer}.down" in self.planes:
            self.ffn_by_rows(layer, x, out)
        else:
            (self.apart_ffn if apart else self.dense_ffn)(layer, x, out)

    def sparse_ffn(
        self, layer: int, x: np.ndarray, out: np.ndarray, *, begun: bool = False
    ) -> None:
        """FFN of a naturally sparse family: only neurons whose activation is not zero are read.

        The deciding matrix is gate (gated) or up (ungated).  Every neuron left out would add an
        exact zero, so the result has the bits of the dense computation.
        """
        kernels, plane = self.kernels, f"layers.{layer}.ffn"
        if not begun:
            self._begin_sparse(layer, x, out)
        elif self.config.gated:
            kernels.prepared(self.activations, x, self.views[plane]["up"])
        decided = self.scratch.view("decided", x.shape[0], self.config.intermediate_size)
        if self.observer is not None:
            self.observer(layer, x, decided)
        n_active = kernels.active_ids(decided, self._ids)
        self.clock.phase = FFN
        self._count(layer, decided, n_active)
        self._add_acquired(layer, self._ids[:n_active], decided, out)
        self._add_bias(f"layers.{layer}.ffn.bias", out)
        self.clock.phase = ATTENTION

    def _add_acquired(
        self, layer: int, ids: np.ndarray, decided: np.ndarray, out: np.ndarray
    ) -> None:
        """Add neurons `ids`, whose pre-activations are decided[:, ids], as they are there."""
        if not self._add_arriving(layer, ids, decided, out):
            for lease in self.store.acquire(f"layers.{layer}.ffn", ids):
                self._add_neurons(layer, lease, lease.ids, decided, out)

    def _add_arriving(
        self, layer: int, ids: np.ndarray, decided: np.ndarray, out: np.ndarray,
        deciding: PieceView | None = None,
    ) -> bool:  # fmt: skip
        """`_add_decided` of bundles of which some are to be read; False where that takes leases."""
        whole = f"layers.{layer}." not in self._inner_biases
        if not (self.kernels.adds_arriving and out.shape[0] == 1 and whole):
            return False
        arriving = self.store.arriving(f"layers.{layer}.ffn", ids)
        if arriving is None:
            return False
        with arriving:
            self._add_decided(
                layer, arriving, ids, decided, out, deciding=deciding, arriving=arriving.native
            )
        return True

    def _begin_sparse(self, layer: int, x: np.ndarray, out: np.ndarray) -> None:
        decided = self.scratch.view("decided", x.shape[0], self.config.intermediate_size)
        self.clock.phase = PREDICT
        self.linear(f"layers.{layer}.deciding", x, decided, bias=self._deciding_bias(layer))
        self._prepare_up(layer, x)
        self.kernels.clear(out)

    def ffn_is_whole(self, layer: int) -> bool:
        """Whether one token's FFN, having begun, is operators alone to its end: `whole_ffn`."""
        prefix = f"layers.{layer}."
        if prefix in self._inner_biases or self.store.whole(prefix + "ffn") is None:
            return False
        if (predictor := self.predictor_of(layer)) is not None:
            return predictor.in_order and prefix + "deciding" not in self.planes
        return True

    def whole_ffn(self, layer: int, out: np.ndarray) -> None:
        """What `ffn` does of one token after `begin_ffn`, where the bundles are in memory as a
        whole.  How much it was is told by `count_whole`, when the token is through."""
        plane, chosen = f"layers.{layer}.ffn", self._chosen[layer : layer + 1]
        lease, ids, deciding = self.store.whole(plane), self._ids, None
        decided = self.scratch.view("decided", 1, self.config.intermediate_size)
        self.clock.phase = FFN
        if (predictor := self.predictor_of(layer)) is not None:
            predictor.choose(chosen)
            ids, deciding = predictor.chosen_ids, self._deciding_view(layer)
        else:
            self.kernels.above(decided, None, ids, chosen)
        self._add_decided(layer, lease, ids, decided, out, deciding=deciding, count=chosen)
        self._add_bias(f"layers.{layer}.ffn.bias", out)
        self.clock.phase = ATTENTION

    def count_whole(self, layers: Sequence[int]) -> None:
        """Counts of the token whose FFNs of these layers were `whole_ffn`."""
        for layer in layers:
            n_chosen, n_added = int(self._chosen[layer]), int(self._added[layer])
            self.store.note_used(n_chosen)
            if self.predictor_of(layer) is not None:
                counts = PredictedCounts(predicted=n_chosen, computed=n_added)
                self._count_computed(layer, n_added, counts)
            else:
                self._count_active(layer, n_added, n_added, self.config.intermediate_size)

    def bundled_ffn(self, layer: int, x: np.ndarray, out: np.ndarray) -> None:
        """The same where deciding rows lie in the bundles: all are read, active ones computed."""
        kernels, plane, bias = self.kernels, f"layers.{layer}.ffn", self._deciding_bias(layer)
        view = self.views[plane][self._deciding_piece(plane)]
        decided = self.scratch.view("decided", x.shape[0], self.config.intermediate_size)
        self.clock.phase = FFN
        kernels.prepare(self.activations, x, view)
        out.fill(0.0)
        n_active = 0
        for lease in self.store.scan(plane):
            start, stop = lease.start, lease.stop
            every = np.arange(start, stop, dtype=np.int32)
            pre = self._bundle_dots(view, lease, every, "gathered", x.shape[0])
            self._add_bias(bias, pre, start, stop)
            decided[:, start:stop] = pre
            ids = every[self._ids[: kernels.active_ids(pre, self._ids)]]
            self._add_neurons(layer, lease, ids, decided, out)
            n_active += ids.size
        if self.observer is not None:
            self.observer(layer, x, decided)
        self._count(layer, decided, n_active)
        self._add_bias(f"layers.{layer}.ffn.bias", out)
        self.clock.phase = ATTENTION

    def apart_ffn(self, layer: int, x: np.ndarray, out: np.ndarray) -> None:
        """FFN without natural sparsity whose deciding rows lie apart, for the sake of approximate
        mode: all of it."""
        prefix = f"layers.{layer}."
        decided = self.scratch.view("decided", x.shape[0], self.config.intermediate_size)
        self.clock.phase = FFN
        self.linear(prefix + "deciding", x, decided, bias=self._deciding_bias(layer))
        if self.observer is not None:
            self.observer(layer, x, decided)
        self._prepare_up(layer, x)
        out.fill(0.0)
        for lease in self.store.scan(prefix + "ffn"):
            ids = np.arange(lease.start, lease.stop, dtype=np.int32)
            self._add_neurons(layer, lease, ids, decided, out)
        self._add_bias(prefix + "ffn.bias", out)
        self.clock.phase = ATTENTION

    def _prepare_up(self, layer: int, x: np.ndarray) -> None:
        if self.config.gated:
            self.kernels.prepare(self.activations, x, self.views[f"layers.{layer}.ffn"]["up"])

    def _add_neurons(
        self, layer: int, lease, ids: np.ndarray, decided: np.ndarray, out: np.ndarray
    ) -> None:
        """Add neurons `ids` of a lease, whose pre-activations are decided[:, ids], to `out`.

        The activations are prepared for "up" where the FFN is gated.
        """
        kernels, n_tokens, n = self.kernels, out.shape[0], ids.size
        if n_tokens == 1 and self._add_decided(layer, lease, ids, decided, out):
            return
        views = self.views[f"layers.{layer}.ffn"]
        pre = self.scratch.view("gathered", n_tokens, n)
        np.take(decided, ids, axis=1, out=pre, mode="clip")  # any other mode makes a copy first
        up = None
        if self.config.gated:
            up = self.scratch.view("up", n_tokens, n)
            kernels.dot_ids(self.activations, lease.addresses, views["up"], ids, up)
            if f"layers.{layer}.up.bias" in self.vectors:
                up += self.vectors[f"layers.{layer}.up.bias"][ids]
        kernels.activate(self.config.activation, pre, up, pre)
        kernels.accumulate_ids(pre, lease.addresses, views["down"], ids, out)

    def _add_decided(
        self, layer: int, lease, ids: np.ndarray, decided: np.ndarray, out: np.ndarray,
        deciding: PieceView | None = None, count: np.ndarray | None = None, arriving: Any = None,
    ) -> bool:  # fmt: skip
        """The same for one token, in one call, and with `deciding` the pre-activations as well:
        those of `ids`, or of the first count[0] of them, are made and active ones added.  False
        where a bias comes in between."""
        if f"layers.{layer}." in self._inner_biases:
            return False
        views, n, up = self.views[f"layers.{layer}.ffn"], max(1, ids.size), None
        if self.config.gated:
            up = self.scratch.view("up", 1, n)
        bias = self.vectors.get(self._deciding_bias(layer)) if deciding is not None else None
        added = self._added[-1:] if count is None else self._added[layer : layer + 1]
        self.kernels.add_decided(
            self.activations, lease.addresses, (deciding, None if up is None else views["up"],
            views["down"]), ids, self.config.activation, decided, bias,
            (self.scratch.view("gathered", 1, n), up, self._active_ids), out, added, count=count,
            arriving=arriving,
        )  # fmt: skip
        return True

    def _deciding_piece(self, plane: str) -> str:
        """The piece of an all-in-one bundle that decides."""
        return "gate" if "gate" in self.views[plane] else "up"

    def _deciding_bias(self, layer: int) -> str:
        """The bias of the deciding matrix: it bears its own name in naturally sparse families."""
        own = f"layers.{layer}.deciding.bias"
        first = "gate" if self.config.gated else "up"
        return own if own in self.vectors else f"layers.{layer}.{first}.bias"

    def dense_ffn(self, layer: int, x: np.ndarray, out: np.ndarray, plane: str = "ffn") -> None:
        """FFN without natural sparsity: every bundle (gate | up | down, or up | down) is walked."""
        kernels, prefix, n_tokens = self.kernels, f"layers.{layer}.", x.shape[0]
        views = self.views[prefix + plane]
        first = "gate" if "gate" in views else "up"
        self.clock.phase = FFN
        kernels.prepare(self.activations, x, views[first])
        kernels.clear(out)
        leases = self.store.scan(prefix + plane)
        if n_tokens == 1 and prefix not in self._inner_biases:
            pieces = (views[first], views["up"] if first == "gate" else None, views["down"])
            for lease in leases:
                self._walk_neurons(pieces, lease.addresses, range(lease.start, lease.stop), out)
        else:
            self._add_bundles(prefix, plane, first, leases, out)
        self._add_bias(prefix + "ffn.bias", out)
        self.clock.phase = ATTENTION

    def ffn_by_rows(self, layer: int, x: np.ndarray, out: np.ndarray) -> None:
        """FFN without natural sparsity whose matrices lie by rows: dots all through."""
        prefix, n_tokens, n = f"layers.{layer}.", x.shape[0], self.config.intermediate_size
        self.clock.phase = FFN
        first, up = "up", None
        if self.config.gated:
            first, up = "gate", self.scratch.view("up", n_tokens, n)
        pre = self.scratch.view("decided", n_tokens, n)
        self.linear(prefix + first, x, pre, bias=f"{prefix}{first}.bias")
        if up is not None:
            self.linear(prefix + "up", x, up, bias=prefix + "up.bias")
        self.kernels.activate(self.config.activation, pre, up, pre)
        self.linear(prefix + "down", pre, out, bias=prefix + "ffn.bias")
        self.clock.phase = ATTENTION

    def _add_bundles(self, prefix: str, plane: str, first: str, leases, out: np.ndarray) -> None:
        """Add whole leases of bundles to `out`, operator by operator."""
        kernels, views, n_tokens = self.kernels, self.views[prefix + plane], out.shape[0]
        # Blocks of tokens are not bound by reading: no detour through `_paired_dots`.
        blocks = 0 < kernels.many <= n_tokens and views[first].quantised
        rows = self._gate_up_rows(prefix + plane) if first == "gate" and not blocks else None
        for lease in leases:
            up = None
            if rows is not None:
                view, every = rows
                ids = every[2 * lease.start : 2 * lease.stop]
                pre, up = self._paired_dots(view, lease.addresses, ids, n_tokens)
            else:
                ids = np.arange(lease.start, lease.stop, dtype=np.int32)
                pre = self._bundle_dots(views[first], lease, ids, "decided", n_tokens)
                if first == "gate":
                    up = self._bundle_dots(views["up"], lease, ids, "up", n_tokens)
            self._add_bias(f"{prefix}{first}.bias", pre, lease.start, lease.stop)
            if up is not None:
                self._add_bias(prefix + "up.bias", up, lease.start, lease.stop)
            kernels.activate(self.config.activation, pre, up, pre)
            kernels.accumulate_range(
                pre, lease.addresses, views["down"], lease.start, lease.stop, out
            )

    def _walk_neurons(self, pieces, addresses, items, out) -> None:
        """Add the neurons of a lease for one token, in one walk over their bundles."""
        pre = self.scratch.view("decided", 1, len(items))
        up = None if pieces[1] is None else self.scratch.view("up", 1, len(items))
        self.kernels.add_neurons(
            self.activations, addresses, pieces, items, self.config.activation, pre, up, out
        )

    def _gate_up_rows(self, plane: str) -> tuple[PieceView, np.ndarray] | None:
        """`_gate_up_view` and the ids of all gate and up rows, made once."""
        if plane not in self._paired:
            found = self._gate_up_view(plane)
            if found is not None:
                view, every = found
                k = np.arange(2 * self.planes[plane].n_items, dtype=np.int32)
                found = view, every * (k // 2) + k % 2
            self._paired[plane] = found
        return self._paired[plane]

    def _gate_up_view(self, plane: str) -> tuple[PieceView, int] | None:
        """A bundle plane seen as rows, where its pieces allow it: (view, rows of a bundle).

        Bundles of pieces of one length lie in memory as gate 0, up 0, down 0, gate 1, …: one call
        over rows 0, 1, 3, 4, … walks memory once and in order, where two calls would skip through
        it twice.  The dots are the same dots.
        """
        views, stride = self.views[plane], self.planes[plane].stride
        gate, up = views["gate"], views["up"]
        step = up.offset - gate.offset
        if gate.offset or step <= 0 or stride % step:
            return None
        if (gate.weight_type, gate.n_cols) != (up.weight_type, up.n_cols):
            return None
        every = stride // step
        return PieceView(gate.weight_type, gate.per_frame * every, step, 0, gate.n_cols), every

    def _paired_dots(
        self, view: PieceView, addresses: np.ndarray, ids: np.ndarray, n_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(gate, up) dots of rows `ids` of a view of `_gate_up_rows`."""
        n = ids.size // 2
        both = self.scratch.view("gate_up", n_tokens, 2 * n)
        self.kernels.dot_ids(self.activations, addresses, view, ids, both)
        pre, up = (self.scratch.view(name, n_tokens, n) for name in ("decided", "up"))
        np.copyto(pre, both[:, 0::2])
        np.copyto(up, both[:, 1::2])
        return pre, up

    def _bundle_dots(self, view, lease, ids, buffer, n_tokens) -> np.ndarray:
        pre = self.scratch.view(buffer, n_tokens, ids.size)
        self.kernels.dot_ids(self.activations, lease.addresses, view, ids, pre)
        return pre

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

    def _count(self, layer: int, decided: np.ndarray, n_active: int) -> None:
        per_token = n_active if decided.shape[0] == 1 else n_above_zero(decided)
        self._count_active(layer, n_active, per_token, decided.shape[1])

    def _count_active(self, layer: int, n_bundles: int, per_token: int, n_neurons: int) -> None:
        self.counts.active_bundles += n_bundles
        self.counts.active_neurons += per_token
        self.counts.n_neurons += n_neurons
        self.counts.layers[layer] = per_token


def n_above_zero(decided: np.ndarray) -> int:
    """Of all rows together, a few at a time: a pass may have hundreds of tokens."""
    return sum(int(np.count_nonzero(decided[i : i + 16] > 0)) for i in range(0, len(decided), 16))


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
