"""One token's FFN after what it begins with (`begin_ffn`), which has chosen its neurons.

What begins it is operators alone, recorded and repeated (repeats.py).  Where all bundles are in
memory the rest is, too.  Where they are picked it is a request, and one operator that adds what the
request brings: the call is recorded once a sequence, with room for all neurons, and made again for
each token's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..kernels.base import ATTENTION, FFN
from ..predictors.scores import FittedPredictor


class BegunFFN:
    """The part of a DecoderModel that ends what `begin_ffn` began with `choose`."""

    def ffn_chooses(self, layer: int) -> bool:
        """Whether one token's FFN, having begun, knows its neurons by operators alone."""
        prefix = f"layers.{layer}."
        if prefix in self._inner_biases:
            return False
        predictor = self.predictor_of(layer)
        if predictor is None:
            return True
        apart = prefix + "deciding" in self.planes
        fitted = isinstance(predictor, FittedPredictor) and predictor.in_order
        return fitted and not predictor.remembers and not apart

    def ffn_is_whole(self, layer: int) -> bool:
        """Whether one that chooses is operators alone to its end: `whole_ffn`."""
        return self.ffn_chooses(layer) and self.store.whole(f"layers.{layer}.ffn") is not None

    def choose(self, layer: int) -> None:
        """Its neurons, ascending, to the front of `_ids_of` and how many to `_chosen`."""
        chosen = self._chosen[layer : layer + 1]
        if (predictor := self.predictor_of(layer)) is not None:
            predictor.choose(chosen)
            return
        decided = self.scratch.view("decided", 1, self.config.intermediate_size)
        self.kernels.above(decided, None, self._ids, chosen)

    def _ids_of(self, layer: int) -> np.ndarray:
        """Where `choose` puts them: int32, room for every neuron."""
        predictor = self.predictor_of(layer)
        return self._ids if predictor is None else predictor.chosen_ids

    def whole_ffn(self, layer: int, out: np.ndarray) -> None:
        """The rest where the bundles are in memory as a whole.  How much it was is told by
        `count_begun`, when the token is through."""
        self.clock.phase = FFN
        self._add_chosen(layer, self.store.whole(f"layers.{layer}.ffn"), out, self._chosen, layer)
        self._add_bias(f"layers.{layer}.ffn.bias", out)
        self.clock.phase = ATTENTION

    def streamed_ffn(self, layer: int, x: np.ndarray, out: np.ndarray) -> None:
        """The rest where they are picked; counted as that of `whole_ffn`."""
        self.clock.phase = FFN
        calls, every = self._add_calls.get(layer) or (None, self._ids_of(layer))
        ids = every[: int(self._chosen[layer])]
        arriving = self.store.arriving(f"layers.{layer}.ffn", ids)
        if arriving is not None:
            with arriving:
                if calls is None:
                    calls = self._recorded_add(layer, arriving, x, out)
                    self._add_calls[layer] = calls, every
                self.kernels.repeat_arriving(calls, arriving.native)
        else:
            self._add_leases(layer, ids, x, out)
        if (bias := f"layers.{layer}.ffn.bias") in self.vectors:
            self._add_bias(bias, out)
        self.clock.phase = ATTENTION

    def _recorded_add(self, layer: int, arriving, x: np.ndarray, out: np.ndarray) -> Any:
        """The call that adds neurons of this layer, made of none."""
        self._prepared(layer, x)
        with self.kernels.recording() as recorded:
            self._add_chosen(layer, arriving, out, np.zeros(1, np.int64), 0)
        return recorded.calls

    def _add_leases(self, layer: int, ids: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
        """`streamed_ffn` where that takes leases."""
        deciding, n_added = None, 0
        if self.predictor_of(layer) is not None:
            deciding = self._deciding_view(layer)
        decided = self.scratch.view("decided", 1, self.config.intermediate_size)
        self._prepared(layer, x)
        for lease in self.store.acquire(f"layers.{layer}.ffn", ids):
            self._add_decided(layer, lease, lease.ids, decided, out, deciding=deciding)
            n_added += int(self._added[-1])
        self._added[layer] = n_added

    def _prepared(self, layer: int, x: np.ndarray) -> None:
        """Say what `begin_ffn` has prepared, which repeated calls do not."""
        if self.predictor_of(layer) is not None:
            self.kernels.prepared(self.activations, x, self._deciding_view(layer))
        elif self.config.gated:
            up = self.views[f"layers.{layer}.ffn"]["up"]
            self.kernels.prepared(self.activations, x, up)

    def _add_chosen(self, layer: int, lease, out: np.ndarray, counts: np.ndarray, i: int) -> None:
        """Add the first counts[i] of the chosen neurons, out of a lease of all that is there."""
        deciding = None
        if self.predictor_of(layer) is not None:
            deciding = self._deciding_view(layer)
        decided = self.scratch.view("decided", 1, self.config.intermediate_size)
        self._add_decided(
            layer, lease, self._ids_of(layer), decided, out, deciding=deciding,
            count=counts[i : i + 1],
        )  # fmt: skip

    def count_begun(self, whole: Sequence[int], streamed: Sequence[int]) -> None:
        """Counts of the token whose FFNs of these layers were `whole_ffn` and `streamed_ffn`."""
        chosen, n_of = self._chosen.tolist(), self._added.tolist()
        if whole:
            self.store.note_used(sum(chosen[i] for i in whole))
        layers = [*whole, *streamed]
        added = {i: n_of[i] for i in layers}
        n_added, counts = sum(added.values()), self.counts
        counts.active_bundles += n_added
        counts.active_neurons += n_added
        counts.n_neurons += len(layers) * self.config.intermediate_size
        counts.layers.update(added)
        if self._approximating:
            predicted = [i for i in layers if i in self.approximation.predictors]
            counts.predicted.predicted += sum(chosen[i] for i in predicted)
            counts.predicted.computed += sum(added[i] for i in predicted)
