"""Mixture of experts: Llama's layers in which a router sends each token to a few experts' FFNs.

A chunk goes through a layer expert by expert: each expert's neurons are leased once and meet only
the tokens that chose it.  Per token the sum runs over its experts in ascending order and over each
expert's neurons in file order, whatever the chunk, the leases and the other tokens are.
"""

from __future__ import annotations

import numpy as np

from ..kernels.base import ATTENTION, FFN, PREDICT
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
            "decided": ffn,
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
        return (prefix + "qkv", prefix + "o", prefix + "router", prefix + "experts", *shared)

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
        out.fill(0.0)
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
        wanted = np.unique(chosen)
        ids = (wanted[:, None] * n_each + np.arange(n_each, dtype=np.int32)).ravel()
        self._count_experts(layer, chosen.size * n_each, ids.size)
        for lease in self.store.acquire(plane, ids):
            cuts = np.flatnonzero(np.diff(lease.ids // n_each)) + 1
            for part in np.split(lease.ids, cuts):
                tokens, places = np.nonzero(chosen == part[0] // n_each)
                w = weights[tokens, places]
                self._expert(self.views[plane], lease.addresses, part, x, tokens, w, out)

    def _expert(self, views, addresses, ids, x, tokens, weights, out) -> None:
        """Neurons `ids` of one expert, for the tokens (ascending rows of x) that chose it."""
        kernels, n, everyone = self.kernels, tokens.size, tokens.size == x.shape[0]
        mine, sums = x, out
        if not everyone:
            mine, sums = self.scratch.view("expert_in", n), self.scratch.view("expert_out", n)
            np.take(x, tokens, axis=0, out=mine)
            np.take(out, tokens, axis=0, out=sums)
        kernels.prepare(self.activations, mine, views["gate"])
        pre = self.scratch.view("decided", n, ids.size)
        up = self.scratch.view("up", n, ids.size)
        kernels.dot_ids(self.activations, addresses, views["gate"], ids, pre)
        kernels.dot_ids(self.activations, addresses, views["up"], ids, up)
        kernels.activate(self.config.activation, pre, up, pre)
        pre *= weights[:, None]
        kernels.accumulate_ids(pre, addresses, views["down"], ids, sums)
        if not everyone:
            out[tokens] = sums

    def _count_experts(self, layer: int, per_token: int, n_bundles: int) -> None:
        self.counts.active_bundles += n_bundles
        self.counts.active_neurons += per_token
        self.counts.n_neurons += self.config.n_experts * self.config.expert_size
        self.counts.layers[layer] = per_token
