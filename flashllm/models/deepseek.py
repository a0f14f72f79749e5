"""DeepSeek-V2 (arXiv 2405.04434): latent attention, and experts beside an ungated shared one.

A head's key is K c and its value V c of the cached latent c, so q . K c = (K^T q) . c and the sum
of weighted values is V applied to the weighted sum of latents: queries are taken to the latent
space, all heads attend over the one latent, and the result is taken back.  Nothing but c and the
dimensions that turn is cached, and what is cached is never expanded.
"""

from __future__ import annotations

import numpy as np

from .decoder import require_vector
from .moe import MoEModel
from .state import LatentCache

LATENT_NORM_EPS = 1e-6  # fixed in the architecture, in no config key


class DeepSeekModel(MoEModel):
    def __init__(self, config, planes, vectors, store, kernels, *, max_tokens, n_context, path=""):
        super().__init__(
            config, planes, vectors, store, kernels,
            max_tokens=max_tokens, n_context=n_context, path=path,
        )  # fmt: skip
        for i in range(config.n_layers):
            require_vector(path, vectors, f"layers.{i}.latent_norm.weight", config.latent_size)

    @classmethod
    def scratch_widths(cls, config) -> dict[str, int]:
        c = config
        n_key = c.key_size + c.rope.n_rotated
        return {
            **super().scratch_widths(config),
            "qkv": c.n_heads * n_key + c.head_dim,
            "head_query": c.key_size,
            "absorbed": c.n_heads * c.latent_size,
            "attended": c.n_heads * c.head_dim,
            "head_latent": c.latent_size,
            "latent": c.latent_size,
            "heads": c.n_heads * c.value_size,
        }

    @classmethod
    def widest_input(cls, config) -> int:
        return max(config.hidden_size, config.latent_size, config.n_heads * config.value_size)

    @classmethod
    def state_bytes(cls, config, n_context: int, dtype: np.dtype) -> int:
        both = super().state_bytes(config, n_context, dtype)
        values = config.n_layers * config.head_dim * np.dtype(dtype).itemsize
        return both - n_context * values

    def new_state(
        self, n_context: int, dtype: np.dtype, held: int | None = None
    ) -> LatentCache:
        c = self.config
        self.kernels.attention_scratch(n_context)
        return LatentCache(
            n_layers=c.n_layers, n_kv_heads=1, head_dim=c.head_dim, n_context=n_context,
            dtype=dtype, held=held,
        )  # fmt: skip

    def layer_planes(self, layer: int) -> tuple[str, ...]:
        qkv, *others = super().layer_planes(layer)
        return (qkv, f"layers.{layer}.key_up", f"layers.{layer}.value_up", *others)

    def route(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen, weights = super().route(scores)
        return chosen, weights * np.float32(self.config.routed_scale)

    def _attention_repeats(self, layer: int) -> bool:
        return False  # rows are gathered by head in between

    def _attention(self, layer: int, x: np.ndarray, state, out: np.ndarray) -> None:
        c, n_tokens, prefix = self.config, x.shape[0], f"layers.{layer}."
        turning, view = c.rope.n_rotated, self.scratch.view
        qkv = view("qkv", n_tokens)
        self.linear(prefix + "qkv", x, qkv)
        split = c.n_heads * (c.key_size + turning)
        by_head = qkv[:, :split].reshape(n_tokens, c.n_heads, -1)
        latent = view("latent", n_tokens)
        np.copyto(latent, qkv[:, split : split + c.latent_size])
        self.kernels.rms_norm(
            latent, self.vectors[prefix + "latent_norm.weight"], LATENT_NORM_EPS, latent
        )
        # [dimensions that turn | latent], of queries and of the one key
        q = view("queries", n_tokens).reshape(n_tokens, c.n_heads, c.head_dim)
        k = view("keys", n_tokens, c.head_dim).reshape(n_tokens, 1, c.head_dim)
        _halves(by_head[:, :, c.key_size :], q[:, :, :turning])
        _halves(qkv[:, None, split + c.latent_size :], k[:, :, :turning])
        cos, sin = self.rope.rows(state.positions(n_tokens))
        self.kernels.rope(q, cos, sin)
        self.kernels.rope(k, cos, sin)
        np.copyto(k[:, 0, turning:], latent)
        self._to_latent(prefix + "key_up", by_head, q[:, :, turning:])
        attended = view("attended", n_tokens)
        self.attend(layer, q, k, k, state, attended, scale=c.scale)
        heads = view("heads", n_tokens)
        attended = attended.reshape(n_tokens, c.n_heads, c.head_dim)
        self._from_latent(prefix + "value_up", attended[:, :, turning:], heads)
        self.linear(prefix + "o", heads, out)

    def _to_latent(self, plane: str, by_head: np.ndarray, out: np.ndarray) -> None:
        """out[t, head] = sum over a head's key dimensions of q times that row of the plane."""
        c, n_tokens, view = self.config, by_head.shape[0], self.views[plane]["row"]
        sums = self.scratch.view("absorbed", n_tokens).reshape(c.n_heads, n_tokens, c.latent_size)
        sums.fill(0.0)
        for lease in self.store.scan(plane):
            for head, start, stop in _by_head(lease, c.key_size):
                first = head * c.key_size
                query = self.scratch.view("head_query", n_tokens, stop - start)
                np.copyto(query, by_head[:, head, start - first : stop - first])
                self.kernels.accumulate_range(
                    query, lease.addresses, view, start, stop, sums[head]
                )
        np.copyto(out, sums.transpose(1, 0, 2))

    def _from_latent(self, plane: str, attended: np.ndarray, out: np.ndarray) -> None:
        """out [T, heads * value_size]: every head's rows of the plane times what it attended to."""
        c, n_tokens, view = self.config, attended.shape[0], self.views[plane]["row"]
        latent = self.scratch.view("head_latent", n_tokens)
        for lease in self.store.scan(plane):
            for head, start, stop in _by_head(lease, c.value_size):
                np.copyto(latent, attended[:, head])
                self.kernels.prepare(self.activations, latent, view)
                self.kernels.dot_range(
                    self.activations, lease.addresses, view, start, stop, out
                )


def _by_head(lease, n_each: int):
    """(head, start, stop) of the rows of a lease, cut where the head changes."""
    for head in range(lease.start // n_each, -(-lease.stop // n_each)):
        yield head, max(lease.start, head * n_each), min(lease.stop, (head + 1) * n_each)


def _halves(pairs: np.ndarray, out: np.ndarray) -> None:
    """Neighbours that turn together, as the first and second half that `rope` turns."""
    half = out.shape[-1] // 2
    np.copyto(out[..., :half], pairs[..., 0::2])
    np.copyto(out[..., half:], pairs[..., 1::2])
