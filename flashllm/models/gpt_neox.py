"""GPT-NeoX, Pythia and Falcon (arXiv 2204.06745, 2311.16867): attention and FFN side by side,
LayerNorms with bias, one matrix whose rows are by key head: its queries, the key, the value."""

from __future__ import annotations

import numpy as np

from .decoder import DecoderModel, require_vector
from .rope_table import RopeTable


class GPTNeoXModel(DecoderModel):
    def __init__(self, config, planes, vectors, store, kernels, *, max_tokens, n_context, path=""):
        super().__init__(
            config, planes, vectors, store, kernels, max_tokens=max_tokens, n_context=n_context
        )
        self.rope = RopeTable(config.rope, n_context)
        norms = ["final_norm"]
        for i in range(config.n_layers):
            norms += [f"layers.{i}.{norm}" for norm in config.layer_norms]
        for norm in norms:
            for part in ("weight", "bias"):
                require_vector(path, vectors, f"{norm}.{part}", config.hidden_size)

    @classmethod
    def scratch_widths(cls, config) -> dict[str, int]:
        h, ffn = config.hidden_size, config.intermediate_size
        return {
            "x": h, "normed": h, "residual": h, "attended": h, "qkv": config.qkv_rows, "queries": h,
            "keys": config.n_kv_heads * config.head_dim, "heads": h, "decided": ffn,
            "gathered": ffn,
        }  # fmt: skip

    @classmethod
    def widest_input(cls, config) -> int:
        return config.hidden_size

    def _hidden(self, ids: np.ndarray, state) -> np.ndarray:
        names = ("x", "normed", "residual", "attended")
        x, normed, residual, attended = (self.scratch.view(name, ids.size) for name in names)
        self.embed("embed", ids, x)
        for layer in range(self.config.n_layers):
            prefix = f"layers.{layer}."
            self.layer_norm(x, prefix + "attn_norm", normed)
            self._attention(layer, normed, state, attended)
            if not self.config.parallel:
                x += attended
            if "ffn_norm" in self.config.layer_norms:
                self.layer_norm(x, prefix + "ffn_norm", normed)
            self.ffn(layer, normed, residual)
            if self.config.parallel:
                residual += attended
            x += residual
        return x

    def _attention(self, layer: int, x: np.ndarray, state, out: np.ndarray) -> None:
        c, n_tokens, prefix = self.config, x.shape[0], f"layers.{layer}."
        qkv = self.scratch.view("qkv", n_tokens)
        self.linear(prefix + "qkv", x, qkv, bias=prefix + "qkv.bias")
        group = c.n_heads // c.n_kv_heads
        q = self.scratch.view("queries", n_tokens).reshape(n_tokens, c.n_kv_heads, group, -1)
        k = self.scratch.view("keys", n_tokens).reshape(n_tokens, c.n_kv_heads, c.head_dim)
        by_head = qkv.reshape(n_tokens, c.n_kv_heads, group + 2, c.head_dim)
        np.copyto(q, by_head[:, :, :group])
        np.copyto(k, by_head[:, :, group])
        q = q.reshape(n_tokens, c.n_heads, c.head_dim)
        cos, sin = self.rope.rows(state.positions(n_tokens))
        self.kernels.rope(q, cos, sin)
        self.kernels.rope(k, cos, sin)
        heads = self.scratch.view("heads", n_tokens)
        self.attend(layer, q, k, by_head[:, :, -1], state, heads, scale=c.head_dim**-0.5)
        self.linear(prefix + "o", heads, out, bias=prefix + "o.bias")

    def _logits(self, hidden: np.ndarray, out: np.ndarray) -> None:
        normed = self.scratch.view("normed", hidden.shape[0])
        self.layer_norm(hidden, "final_norm", normed)
        self.linear(self.head_plane, normed, out)
