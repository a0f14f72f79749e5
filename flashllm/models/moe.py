"""Mixture of experts: Llama's layers in which a router sends each token to a few experts' FFNs.

A chunk goes through a layer expert by expert: each expert's neurons are leased once and meet only
the tokens that chose it.  Per token the sum runs over its experts in ascending order and over each
expert's neurons in file order, whatever the chunk, the leases and the other tokens are.
Where experts have ReLU, the gates of the chosen ones decide and only neurons that are active for a
token of the chunk are read further.
"""

from __future__ import annotations

import numpy as np

from ..kernels.base import ATTENTION, FFN, PREDICT
from .decoder import n_above_zero
from .llama import LlamaModel
from .routing import route, sigmoid


class MoEModel(LlamaModel):
    @classmethod
    def scratch_widths(cls, config) -> dict[str, int]:
        plain = len(config.expert_layers) < config.n_layers
        ffn = max(config.expert_size, config.shared_size, config.intermediate_size * plain)
        h = config.hidden_size
        return {
            **super().scratch_widths(config),
            "decided": max(ffn, config.n_chosen * config.expert_size * config.sparse),
            "gathered": ffn,
            "up": ffn,
            "gate_up": 2 * ffn,
            "scores": config.n_experts + 1,
            "expert_in": h,
            "expert_out": h,
            "shared": h,
        }

    def layer_planes(self, layer: int) -> tuple[str, ...]:
        if layer not in self.config.expert_layers:
            return super().layer_planes(layer)
        prefix = f"layers.{layer}."
        shared = (prefix + "shared",) if self.config.shared_size else ()
        neurons = (prefix + "neurons",) if prefix + "neurons" in self.planes else ()
        routed = (prefix + "router", prefix + "experts", *neurons)
        return (prefix + "qkv", prefix + "o", *routed, *shared)

    def ffn(self, layer: int, x: np.ndarray, out: np.ndarray) -> None:
        c, n_tokens = self.config, x.shape[0]
        if layer not in c.expert_layers:
            super().ffn(layer, x, out)
            return
        gated = bool(c.shared_size) and c.shared_gated
        scores = self.scratch.view("scores", n_tokens, c.n_experts + gated)
        self.clock.phase = PREDICT
        self.linear(f"layers.{layer}.router", x, scores)
        chosen, weights = self.route(scores[:, : c.n_experts])
        self.clock.phase = FFN
        if self.observer is not None:
            mask = np.zeros((n_tokens, c.n_experts), np.float32)
            np.put_along_axis(mask, chosen, 1.0, axis=1)
            self.observer(layer, x, mask)
        out.fill(0.0)
        if f"layers.{layer}.neurons" in self.planes:
            self._sparse_experts(layer, x, chosen, weights, out)
        elif n_tokens == 1:
            self._experts_of_one(layer, x, chosen[0], weights[0], out)
        else:
            self._experts(layer, x, chosen, weights, out)
        if c.shared_size:
            shared = self.scratch.view("shared", n_tokens)
            self.dense_ffn(layer, x, shared, plane="shared")
            if gated:
                shared *= sigmoid(scores[:, c.n_experts])[:, None]
            out += shared
        self.clock.phase = ATTENTION

    def route(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return route(scores, self.config.n_chosen, normalise=self.config.normalise)

    def _experts(self, layer, x, chosen, weights, out) -> None:
        """Adds to each row of `out` the weighted sum of its token's experts."""
        plane, n_each = f"layers.{layer}.experts", self.config.expert_size
        ids = self._neurons_of(np.unique(chosen))
        self._count_experts(layer, chosen.size * n_each, ids.size)
        for lease in self.store.acquire(plane, ids):
            for part in self._by_expert(lease.ids):
                tokens, places = np.nonzero(chosen == part[0] // n_each)
                w = weights[tokens, places]
                self._expert(self.views[plane], lease.addresses, part, x, tokens, w, out)

    def _experts_of_one(self, layer, x, chosen, weights, out) -> None:
        """The same for one token: its experts lie in one list of neurons, so that a lease takes
        three calls and not five an expert."""
        kernels, plane = self.kernels, f"layers.{layer}.experts"
        n_each, views = self.config.expert_size, self.views[plane]
        ids, shares = self._neurons_of(chosen), np.repeat(weights, n_each)
        self._count_experts(layer, ids.size, ids.size)
        kernels.prepare(self.activations, x, views["gate"])
        most = n_each * self.max_tokens  # what the scratch holds for one token
        for lease in self.store.acquire(plane, ids):
            for start in range(0, lease.ids.size, most):
                part = lease.ids[start : start + most]
                pre, up = self._gate_and_up(plane, lease.addresses, part, 1)
                kernels.activate(self.config.activation, pre, up, pre)
                first = lease.first + start
                pre *= shares[first : first + part.size]
                kernels.accumulate_ids(pre, lease.addresses, views["down"], part, out)

    def _gate_and_up(
        self, plane: str, addresses: np.ndarray, ids: np.ndarray, n_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Both dots of neurons `ids` with what has been prepared, [n_tokens, ids.size]."""
        paired = self._gate_up_view(plane)
        if paired is not None:
            view, every = paired
            rows = np.add.outer(ids * np.int32(every), np.arange(2, dtype=np.int32)).reshape(-1)
            return self._paired_dots(view, addresses, rows, n_tokens)
        pre, up = (self.scratch.view(name, n_tokens, ids.size) for name in ("decided", "up"))
        for piece, dots in (("gate", pre), ("up", up)):
            self.kernels.dot_ids(self.activations, addresses, self.views[plane][piece], ids, dots)
        return pre, up

    def _neurons_of(self, experts: np.ndarray) -> np.ndarray:
        n_each = self.config.expert_size
        return (experts[:, None] * n_each + np.arange(n_each, dtype=np.int32)).ravel()

    def _by_expert(self, ids: np.ndarray) -> list[np.ndarray]:
        """`ids` cut where the expert changes; nothing of nothing."""
        cuts = np.flatnonzero(np.diff(ids // self.config.expert_size)) + 1
        return np.split(ids, cuts) if ids.size else []

    def _expert(self, views, addresses, ids, x, tokens, weights, out) -> None:
        """Neurons `ids` of one expert, for the tokens (ascending rows of x) that chose it."""
        n = tokens.size
        mine = self._rows(x, tokens, "expert_in")
        pre = self.scratch.view("decided", n, ids.size)
        self.kernels.prepare(self.activations, mine, views["gate"])
        self.kernels.dot_ids(self.activations, addresses, views["gate"], ids, pre)
        self._add_expert(views, addresses, ids, pre, tokens, weights, out)

    def _sparse_experts(self, layer, x, chosen, weights, out) -> None:
        """As `_experts`, reading of the chosen experts what their gates leave active."""
        gates, neurons = f"layers.{layer}.experts", f"layers.{layer}.neurons"
        n_each, wanted = self.config.expert_size, np.unique(chosen)
        flat = self.scratch.view("decided", x.shape[0]).reshape(-1)
        decided, at = {}, 0  # expert -> its tokens, their weights, its gates' dots with them
        for e in wanted.tolist():
            tokens, places = np.nonzero(chosen == e)
            here = flat[at : at + tokens.size * n_each].reshape(tokens.size, n_each)
            decided[e] = (tokens, weights[tokens, places], here)
            at += here.size
        for lease in self.store.acquire(gates, self._neurons_of(wanted)):
            for part in self._by_expert(lease.ids):
                e = int(part[0]) // n_each
                tokens, _, pre = decided[e]
                mine, view = self._rows(x, tokens, "expert_in"), self.views[gates]["gate"]
                dots = self.scratch.view("up", tokens.size, part.size)
                self.kernels.prepare(self.activations, mine, view)
                self.kernels.dot_ids(self.activations, lease.addresses, view, part, dots)
                pre[:, part[0] - e * n_each : part[-1] + 1 - e * n_each] = dots
        active = [self._active(e, pre) for e, (_, _, pre) in decided.items()]
        ids = np.concatenate(active)
        n_active = sum(n_above_zero(pre) for _, _, pre in decided.values())
        self._count_experts(layer, n_active, ids.size)
        for lease in self.store.acquire(neurons, ids):
            for part in self._by_expert(lease.ids):
                e = int(part[0]) // n_each
                tokens, w, pre = decided[e]
                coef = self.scratch.view("gathered", tokens.size, part.size)
                np.take(pre, part - e * n_each, axis=1, out=coef, mode="clip")
                views = self.views[neurons]
                mine = self._rows(x, tokens, "expert_in")
                self.kernels.prepare(self.activations, mine, views["up"])
                self._add_expert(views, lease.addresses, part, coef, tokens, w, out)

    def _active(self, expert: int, pre: np.ndarray) -> np.ndarray:
        """Ids in the plane of an expert's neurons above zero for any of its tokens."""
        n_each = self.config.expert_size
        found = np.empty(n_each, np.int32)
        return found[: self.kernels.active_ids(pre, found)] + np.int32(expert * n_each)

    def _add_expert(self, views, addresses, ids, pre, tokens, weights, out) -> None:
        """Adds neurons `ids` of one expert, whose gates' dots are `pre`, to its tokens' rows; the
        tokens' inputs have been prepared."""
        kernels, n = self.kernels, tokens.size
        sums = self._rows(out, tokens, "expert_out")
        up = self.scratch.view("up", n, ids.size)
        kernels.dot_ids(self.activations, addresses, views["up"], ids, up)
        kernels.activate(self.config.activation, pre, up, pre)
        pre *= weights[:, None]
        kernels.accumulate_ids(pre, addresses, views["down"], ids, sums)
        if sums is not out:
            out[tokens] = sums

    def _rows(self, x: np.ndarray, tokens: np.ndarray, buffer: str) -> np.ndarray:
        """Rows `tokens` of x, copied unless they are all of them."""
        if tokens.size == x.shape[0]:
            return x
        rows = self.scratch.view(buffer, tokens.size)
        return np.take(x, tokens, axis=0, out=rows, mode="clip")

    def _count_experts(self, layer: int, per_token: int, n_bundles: int) -> None:
        self.counts.active_bundles += n_bundles
        self.counts.active_neurons += per_token
        self.counts.n_neurons += self.config.n_experts * self.config.expert_size
        self.counts.layers[layer] = per_token
