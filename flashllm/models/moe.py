"""Mixture of experts: Llama's layers in which a router sends each token to a few experts' FFNs.

A chunk goes through a layer expert by expert: each expert's neurons are leased once and meet only
the tokens that chose it.  Per token each expert has a sum over its neurons in file order; those are
weighted and added in ascending order of experts, whatever the chunk, the leases and the other
tokens are.  So a single token's experts may be computed in the order in which they come.
Where experts have ReLU, the gates of the chosen ones decide and only neurons that are active for a
token of the chunk are read further.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..kernels.base import ATTENTION, FFN, PREDICT
from .ffn import n_above_zero
from .llama import LlamaModel
from .look_ahead import LookAhead
from .pages import own_pages
from .routing import route, sigmoid


class MoEModel(LlamaModel):
    look_ahead: LookAhead | None = None  # or what reads the next layer's experts early

    def __init__(self, config, *given, **named):
        super().__init__(config, *given, **named)
        # Of a single token: what each of its experts adds, before it is weighted.
        self._sums_of_one = own_pages((config.n_chosen, config.hidden_size), np.float32)
        self._guesses = own_pages((1, config.n_experts + 1), np.float32)
        self._seen_early = self.kernels.activations(1, config.hidden_size)

    @classmethod
    def chunk_bytes(cls, config, n: int, kernels, embed_stride: int) -> int:
        own = 4 * (config.n_chosen * config.hidden_size + config.n_experts + 1)
        own += kernels.activation_bytes(1, config.hidden_size)
        return super().chunk_bytes(config, n, kernels, embed_stride) + own

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

    def _ffn_repeats(self, layer: int) -> bool:
        return layer not in self.config.expert_layers and super()._ffn_repeats(layer)

    def ffn_begins(self, layer: int) -> bool:
        return layer not in self.config.expert_layers and super().ffn_begins(layer)

    def ffn(self, layer: int, x: np.ndarray, out: np.ndarray, *, begun: bool = False) -> None:
        c, n_tokens = self.config, x.shape[0]
        if layer not in c.expert_layers:
            super().ffn(layer, x, out, begun=begun)
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
        ids, prepared = self._neurons_of(np.unique(chosen)), -1
        self._count_experts(layer, chosen.size * n_each, ids.size)
        leases = self.store.acquire(plane, ids)
        for expert, tokens, addresses, part, sums in self._summed(leases, chosen, weights, out):
            views, pre = self.views[plane], self.scratch.view("decided", tokens.size, part.size)
            if expert != prepared:
                mine, prepared = self._rows(x, tokens, "expert_in"), expert
                self.kernels.prepare(self.activations, mine, views["gate"])
            self.kernels.dot_ids(self.activations, addresses, views["gate"], part, pre)
            self._add_part(views, addresses, part, pre, sums)

    def _experts_of_one(self, layer, x, chosen, weights, out) -> None:
        """The same for one token, whose experts may come in any order: each has a sum of its own
        and they are added in the end, ascending."""
        plane, n_each = f"layers.{layer}.experts", self.config.expert_size
        ids, views = self._neurons_of(chosen), self.views[plane]
        self._count_experts(layer, ids.size, ids.size)
        self.kernels.prepare(self.activations, x, views["gate"])
        pieces = views["gate"], views["up"], views["down"]
        sums, ahead = self._sums_of_one, self.look_ahead
        sums.fill(0.0)
        if ahead is not None:
            ahead.came(layer, chosen)
        for lease in self.store.acquire(plane, ids, unit=n_each):
            if ahead is not None:  # this layer's reads are under way: the next one's may follow
                self._look_ahead(layer + 1, x, ahead)
                ahead = None
            for part in self._by_expert(lease.ids):
                first = int(part[0])
                k = int(np.searchsorted(chosen, first // n_each))
                items = range(first, first + part.size)
                self._walk_neurons(pieces, lease.addresses, items, sums[k : k + 1])
        sums *= weights[:, None]
        for row in sums:
            out += row

    def _look_ahead(self, layer: int, x: np.ndarray, ahead: LookAhead) -> None:
        """Advice for `layer`, as if its input were `x`, where knowing it costs no read."""
        router, plane = self.store.held(f"layers.{layer}.router"), f"layers.{layer}.experts"
        if router is None or f"layers.{layer}.neurons" in self.planes:
            return
        view, n = self.views[f"layers.{layer}.router"]["row"], router.stop
        scores = self._guesses[:, :n]
        self.kernels.prepare(self._seen_early, x, view)
        self.kernels.dot_range(self._seen_early, router.addresses, view, 0, n, scores)
        scores = scores[:, : self.config.n_experts]
        chosen = self.route(scores)[0][0]
        likeliest = chosen[np.argsort(-scores[0, chosen], kind="stable")]
        first = likeliest * np.int32(self.config.expert_size)
        absent = likeliest[self.store.absent(plane, first)][: ahead.most]
        if ahead.guess(layer, absent):
            wanted, beside = self._neurons_of(np.sort(absent)), self._neurons_of(chosen)
            self.store.prefetch(plane, wanted, beside=beside)

    def _summed(self, leases, chosen, weights, out) -> Iterator[tuple]:
        """(expert, its tokens, addresses, neurons, sums) of leases over whole experts, ascending.

        What is added to `sums` [tokens, hidden_size] goes to those tokens' rows of `out`, times the
        expert's weights, when all of the expert's neurons have been seen.
        """
        expert, tokens, sums = -1, None, None
        for lease in leases:
            for part in self._by_expert(lease.ids):
                if part[0] // self.config.expert_size != expert:
                    self._add_sums(expert, tokens, sums, chosen, weights, out)
                    expert = int(part[0]) // self.config.expert_size
                    tokens = tokens_of(expert, chosen)
                    sums = self.scratch.view("expert_out", tokens.size)
                    sums.fill(0.0)
                yield expert, tokens, lease.addresses, part, sums
        self._add_sums(expert, tokens, sums, chosen, weights, out)

    def _add_sums(self, expert, tokens, sums, chosen, weights, out) -> None:
        if expert < 0:
            return
        sums *= weights[chosen == expert][:, None]  # a token chooses an expert once
        if tokens.size == len(out):
            out += sums
            return
        rows = self._rows(out, tokens, "expert_in")  # what was in it is not needed any more
        rows += sums
        out[tokens] = rows

    def _neurons_of(self, experts: np.ndarray) -> np.ndarray:
        n_each = self.config.expert_size
        return (experts[:, None] * n_each + np.arange(n_each, dtype=np.int32)).ravel()

    def _by_expert(self, ids: np.ndarray) -> list[np.ndarray]:
        """`ids` cut where the expert changes; nothing of nothing."""
        cuts = np.flatnonzero(np.diff(ids // self.config.expert_size)) + 1
        return np.split(ids, cuts) if ids.size else []

    def _sparse_experts(self, layer, x, chosen, weights, out) -> None:
        """As `_experts`, reading of the chosen experts what their gates leave active."""
        gates, neurons = f"layers.{layer}.experts", f"layers.{layer}.neurons"
        n_each, wanted = self.config.expert_size, np.unique(chosen)
        flat = self.scratch.view("decided", x.shape[0]).reshape(-1)
        decided, at = {}, 0  # expert -> its tokens, its gates' dots with them
        for e in wanted.tolist():
            tokens = tokens_of(e, chosen)
            here = flat[at : at + tokens.size * n_each].reshape(tokens.size, n_each)
            decided[e] = (tokens, here)
            at += here.size
        for lease in self.store.acquire(gates, self._neurons_of(wanted)):
            for part in self._by_expert(lease.ids):
                e = int(part[0]) // n_each
                tokens, pre = decided[e]
                mine, view = self._rows(x, tokens, "expert_in"), self.views[gates]["gate"]
                dots = self.scratch.view("up", tokens.size, part.size)
                self.kernels.prepare(self.activations, mine, view)
                self.kernels.dot_ids(self.activations, lease.addresses, view, part, dots)
                pre[:, part[0] - e * n_each : part[-1] + 1 - e * n_each] = dots
        active = [self._active(e, pre) for e, (_, pre) in decided.items()]
        ids, views = np.concatenate(active), self.views[neurons]
        n_active = sum(n_above_zero(pre) for _, pre in decided.values())
        self._count_experts(layer, n_active, ids.size)
        leases, prepared = self.store.acquire(neurons, ids), -1
        for e, tokens, addresses, part, sums in self._summed(leases, chosen, weights, out):
            if e != prepared:
                mine, prepared = self._rows(x, tokens, "expert_in"), e
                self.kernels.prepare(self.activations, mine, views["up"])
            pre = self.scratch.view("gathered", tokens.size, part.size)
            np.take(decided[e][1], part - e * n_each, axis=1, out=pre, mode="clip")
            self._add_part(views, addresses, part, pre, sums)

    def _active(self, expert: int, pre: np.ndarray) -> np.ndarray:
        """Ids in the plane of an expert's neurons above zero for any of its tokens."""
        n_each = self.config.expert_size
        found = np.empty(n_each, np.int32)
        return found[: self.kernels.active_ids(pre, found)] + np.int32(expert * n_each)

    def _add_part(self, views, addresses, ids, pre, sums) -> None:
        """Adds neurons `ids` of one expert, whose gates' dots with what has been prepared are
        `pre`, to the sums of its tokens."""
        kernels = self.kernels
        up = self.scratch.view("up", len(pre), ids.size)
        kernels.dot_ids(self.activations, addresses, views["up"], ids, up)
        kernels.activate(self.config.activation, pre, up, pre)
        kernels.accumulate_ids(pre, addresses, views["down"], ids, sums)

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


def tokens_of(expert: int, chosen: np.ndarray) -> np.ndarray:
    """Rows of `chosen`, ascending, that name the expert."""
    return np.flatnonzero((chosen == expert).any(axis=1))
