"""A decoder's FFNs: which of them a layer has, and those of naturally sparse families.

Knows planes, leases and kernels; nothing of attention or of where a weight lies.  Those that
compute everything are in dense_ffn.py, those that leave something out in approximate.py, and in
begun_ffn.py how one token's ends natively.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..kernels.base import ATTENTION, FFN, PREDICT, PieceView
from ..predictors import Predictor
from ..predictors.scores import FittedPredictor
from .approximate import ApproximateFFN, PredictedCounts
from .begun_ffn import BegunFFN
from .dense_ffn import DenseFFN


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


class FeedForward(ApproximateFFN, BegunFFN, DenseFFN):
    """The part of a DecoderModel that computes FFNs (x is [T, hidden_size], normed)."""

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

    def begin_ffn(
        self, layer: int, x: np.ndarray, out: np.ndarray, *, choose: bool = False
    ) -> None:
        """Where `ffn_begins`: what decides which neurons one token computes, and an empty sum.  The
        rest of it is `ffn` with `begun`, or with `choose` what begun_ffn.py has."""
        if self.predictor_of(layer) is not None:
            self.begin_approximate(layer, x, out)
        else:
            self._begin_sparse(layer, x, out)
        if choose:
            self.choose(layer)

    def begun(self) -> list[np.ndarray]:
        """Arrays that `begin_ffn` fills, beside its `out`."""
        arrays = [self.scratch.view("decided", 1), self._ids, self._chosen]
        fitted = self.approximation.predictors.values() if self.approximation is not None else ()
        fitted = [p for p in fitted if isinstance(p, FittedPredictor)][:1]
        return arrays + [array for p in fitted for array in (p.scratch.raw, p.scratch.ids)]

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

    def _bundle_dots(self, view, lease, ids, buffer, n_tokens) -> np.ndarray:
        pre = self.scratch.view(buffer, n_tokens, ids.size)
        self.kernels.dot_ids(self.activations, lease.addresses, view, ids, pre)
        return pre

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
