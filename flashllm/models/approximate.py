"""Approximate decoding: of a layer's neurons only those that somebody names are computed.

Who names them is a predictor, before a deciding row is read, or a threshold on the magnitude of the
activated gate (CATS, arXiv 2404.08763), when the deciding matrix has been computed.  What is
computed depends on the layer's input and the sequence, never on what is cached, planned or audited,
so that the tokens are the same under any cap.  Prompts do not come here: they are exact.

An audit is a look at the truth beside a computation that it does not change: deciding rows are
computed whether they were predicted or not, and what the predictor missed is counted.  Each looks
at a sixteenth of a wide layer, the next at the next: all of it every time took a quarter of the
time in half of a model's memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..kernels.base import ATTENTION, FFN, PREDICT, PieceView
from ..predictors import Predictor

AUDIT_SLICES = 16
AUDIT_LEAST = 512  # neurons of a slice
AUDIT_BLOCK = 64  # neurons in a row: slices are spread over the file's order, in long pieces


@dataclass
class PredictedCounts:
    """Sums over layers (and tokens): `computed` of the `predicted` are active.  Where audits
    looked, `true` are active, of which `found` were among the `guessed`; they took `audit_ns`."""

    predicted: int = 0
    computed: int = 0
    true: int = 0
    guessed: int = 0
    found: int = 0
    audit_ns: int = 0

    def add(self, other: PredictedCounts) -> None:
        self.predicted += other.predicted
        self.computed += other.computed
        self.true += other.true
        self.guessed += other.guessed
        self.found += other.found
        self.audit_ns += other.audit_ns

    @property
    def recall(self) -> float | None:
        return self.found / self.true if self.true else None

    @property
    def precision(self) -> float | None:
        return self.found / self.guessed if self.guessed else None


@dataclass
class Approximation:
    """Layers in `predictors` compute what is predicted, layers in `thresholds` what exceeds them,
    others everything.  Of the tokens decoded in a sequence the first and every `audit_every`-th
    after it are audited; 0 audits none."""

    predictors: Mapping[int, Predictor] = field(default_factory=dict)
    thresholds: Mapping[int, float] = field(default_factory=dict)
    audit_every: int = 0
    auditing: bool = False  # this token
    n_decoded: int = 0

    def reset(self) -> None:
        """A new sequence begins."""
        self.n_decoded = 0
        for predictor in self.predictors.values():
            predictor.reset()

    @property
    def n_audits(self) -> int:
        """Tokens audited before this one."""
        return (self.n_decoded - 1) // self.audit_every

    def begin_token(self) -> None:
        due = self.audit_every > 0 and self.n_decoded % self.audit_every == 0
        self.auditing = due and bool(self.predictors)
        self.n_decoded += 1


@dataclass(frozen=True)
class Slice:
    """Of a layer's `n` neurons those in every `n_slices`-th block, from block `first` on."""

    n: int
    n_slices: int
    first: int

    @classmethod
    def of(cls, n: int, turn: int) -> Slice:
        """The slice of audit `turn`; as many turns as there are slices see every neuron once."""
        n_slices = min(AUDIT_SLICES, max(1, n // AUDIT_LEAST))
        return cls(n, n_slices, turn % n_slices)

    def ids(self) -> np.ndarray:
        blocks = np.arange(self.first, -(-self.n // AUDIT_BLOCK), self.n_slices, dtype=np.int32)
        each = np.arange(AUDIT_BLOCK, dtype=np.int32)
        ids = (blocks[:, None] * np.int32(AUDIT_BLOCK) + each).ravel()
        return ids[: np.searchsorted(ids, self.n)]

    def count(self, ids: np.ndarray) -> int:
        """How many of `ids` it holds."""
        return int(np.count_nonzero(ids // AUDIT_BLOCK % self.n_slices == self.first))


class ApproximateFFN:
    """The part of a DecoderModel that decodes one token approximately (x is [1, hidden_size])."""

    approximation: Approximation | None = None

    def approximate_ffn(self, layer: int, x: np.ndarray, out: np.ndarray, begun: bool) -> bool:
        """The layer's FFN into `out` as the approximation has it; False where it has nothing to
        say and the caller computes everything.  `begun`: `begin_approximate` has been called."""
        approximation = self.approximation
        if layer in approximation.thresholds:
            self._thresholded_ffn(layer, x, approximation.thresholds[layer], out)
        elif layer in approximation.predictors:
            self._predicted_ffn(layer, x, approximation.predictors[layer], out, begun)
        else:
            return False
        self._add_bias(f"layers.{layer}.ffn.bias", out)
        self.clock.phase = ATTENTION
        return True

    def begin_approximate(self, layer: int, x: np.ndarray, out: np.ndarray) -> None:
        """Of a layer with a fitted predictor what is operators alone: `scores`, and what its sum
        begins with."""
        self.clock.phase = PREDICT
        self.predictor_of(layer).score(x[0])
        self.clock.phase = FFN
        self._begin_sum(layer, x, out)

    def _begin_sum(self, layer: int, x: np.ndarray, out: np.ndarray) -> None:
        self.kernels.prepare(self.activations, x, self._deciding_view(layer))
        self.kernels.clear(out)

    def _deciding_view(self, layer: int) -> PieceView:
        deciding, ffn = f"layers.{layer}.deciding", f"layers.{layer}.ffn"
        if deciding in self.planes:
            return self.views[deciding]["row"]
        return self.views[ffn][self._deciding_piece(ffn)]

    def _predicted_ffn(self, layer: int, x, predictor: Predictor, out, begun: bool) -> None:
        if begun:
            self.clock.phase = FFN
            self.kernels.prepared(self.activations, x, self._deciding_view(layer))
            ids = predictor.chosen()
        else:
            ids = self._predict(predictor, x)
            self._begin_sum(layer, x, out)
        apart = f"layers.{layer}.deciding" in self.planes
        n_active = (self._apart_sum if apart else self._bundled_sum)(layer, x, ids, out)
        self._count_computed(layer, n_active, PredictedCounts(ids.size, n_active))
        if self.approximation.auditing or predictor.remembers:
            decided = self.scratch.view("decided", 1, self.config.intermediate_size)
            active = ids[decided[0, ids] > 0]
            # Not the truth, even where it is audited: tokens must not depend on audits.
            predictor.observe(active)
        if self.approximation.auditing:
            self._audit_guess(layer, x, ids, active)

    def audit_begun(self, layer: int, x: np.ndarray) -> None:
        """The audit of what begun_ffn.py has just computed."""
        ids = self._ids_of(layer)[: int(self._chosen[layer])]
        decided = self.scratch.view("decided", 1, self.config.intermediate_size)
        self._audit_guess(layer, x, ids, ids[decided[0, ids] > 0])
        self.clock.phase = ATTENTION

    def _audit_guess(self, layer: int, x, ids: np.ndarray, active: np.ndarray) -> None:
        """Of the neurons `ids`, which were computed, `active` were: count what was missed."""
        self.clock.phase = PREDICT
        start = time.perf_counter_ns()
        part = Slice.of(self.config.intermediate_size, self.approximation.n_audits + layer)
        true = self._audited(layer, x, part.ids())
        self.counts.predicted.add(PredictedCounts(
            true=true, guessed=part.count(ids), found=part.count(active),
            audit_ns=time.perf_counter_ns() - start,
        ))  # fmt: skip

    def _predict(self, predictor: Predictor, x) -> np.ndarray:
        """Its ids; all of its time is `predict`, NumPy's too."""
        clock = self.clock
        clock.phase = PREDICT
        started, before = time.perf_counter_ns(), clock.spent()[PREDICT]
        ids = predictor.predict(x[0])
        inside = clock.spent()[PREDICT] - before
        clock.credit(time.perf_counter_ns() - started - inside)
        clock.phase = FFN
        return ids

    def _apart_sum(self, layer: int, x, ids: np.ndarray, out) -> int:
        """Sum of the neurons `ids` whose deciding rows lie apart: those are read first, then the
        bundles of what is active, into `out`, which is 0.  Returns how many are."""
        deciding = f"layers.{layer}.deciding"
        decided = self.scratch.view("decided", 1, self.config.intermediate_size)
        for lease in self.store.acquire(deciding, ids):
            self._decide(layer, lease, self._deciding_view(layer), decided)
        active = ids[decided[0, ids] > 0]
        self._prepare_up(layer, x)
        self._add_acquired(layer, active, decided, out)
        return active.size

    def _bundled_sum(self, layer: int, x, ids: np.ndarray, out) -> int:
        """The same where bundles hold everything, in one pass."""
        ffn, view = f"layers.{layer}.ffn", self._deciding_view(layer)
        decided = self.scratch.view("decided", 1, self.config.intermediate_size)
        if self._add_arriving(layer, ids, decided, out, deciding=view):
            return int(self._added[-1])
        n_active = 0
        for lease in self.store.acquire(ffn, ids):
            if self._add_decided(layer, lease, lease.ids, decided, out, deciding=view):
                n_active += int(self._added[-1])
                continue
            self._decide(layer, lease, view, decided)
            active = lease.ids[decided[0, lease.ids] > 0]
            self._add_neurons(layer, lease, active, decided, out)
            n_active += active.size
        return n_active

    def _decide(self, layer: int, lease, view, decided: np.ndarray) -> None:
        """Pre-activations of the lease's ids into `decided` [1, n], at their places."""
        pre = self._bundle_dots(view, lease, lease.ids, "gathered", 1)
        bias = self.vectors.get(self._deciding_bias(layer))
        if bias is not None:
            pre += bias[lease.ids]
        decided[0, lease.ids] = pre[0]

    def _audited(self, layer: int, x: np.ndarray, ids: np.ndarray) -> int:
        """How many of the neurons `ids` are truly active, by their deciding rows."""
        deciding, ffn = f"layers.{layer}.deciding", f"layers.{layer}.ffn"
        plane, view = deciding if deciding in self.planes else ffn, self._deciding_view(layer)
        decided = self.scratch.view("decided", 1, self.config.intermediate_size)
        self.kernels.prepare(self.activations, x, view)
        for lease in self.store.audit(plane, ids):
            self._decide(layer, lease, view, decided)
        return int(np.count_nonzero(decided[0, ids] > 0))

    def _thresholded_ffn(self, layer: int, x, threshold: float, out) -> None:
        """Neurons whose activated gate is at least `threshold` from zero."""
        deciding = f"layers.{layer}.deciding"
        decided = self.scratch.view("decided", 1, self.config.intermediate_size)
        self.clock.phase = PREDICT
        self.linear(deciding, x, decided, bias=self._deciding_bias(layer))
        magnitude = self.scratch.view("gathered", 1, decided.shape[1])
        self.kernels.activate(self.config.activation, decided, None, magnitude)
        ids = np.flatnonzero(np.abs(magnitude[0]) >= threshold).astype(np.int32)
        self.clock.phase = FFN
        self._prepare_up(layer, x)
        out.fill(0.0)
        self._add_acquired(layer, ids, decided, out)
        self._count_computed(layer, ids.size, PredictedCounts(computed=ids.size))

    def _count_computed(self, layer: int, n: int, counts: PredictedCounts) -> None:
        self._count_active(layer, n, n, self.config.intermediate_size)
        self.counts.predicted.add(counts)
