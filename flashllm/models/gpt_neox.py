"""GPT-NeoX and Pythia (arXiv 2204.06745): attention and FFN side by side, LayerNorms with bias."""

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
            norms += [f"layers.{i}.attn_norm", f"layers.{i}.ffn_norm"]
        for norm in norms:
            for part in ("weight", "bias"):
                require_vector(path, vectors, f"{norm}.{part}", config.hidden_size)

    @classmethod
    def scratch_widths(cls, config) -> dict[str, int]:
        h, ffn = config.hidden_size, config.intermediate_size
        return {
            "x": h, "normed": h, "residual": h, "attended": h, "qkv": 3 * h, "queries": h,
            "keys": h, "heads": h, "decided": ffn, "gathered": ffn,
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
        split = (n_tokens, c.n_heads, c.head_dim)
        q, k = (self.scratch.view(name, n_tokens).reshape(split) for name in ("queries", "keys"))
        by_head = qkv.reshape(n_tokens, c.n_heads, 3, c.head_dim)
        np.copyto(q, by_head[:, :, 0])
        np.copyto(k, by_head[:, :, 1])
        cos, sin = self.rope.rows(state.length, n_tokens)
        self.kernels.rope(q, cos, sin)
        self.kernels.rope(k, cos, sin)
        heads = self.scratch.view("heads", n_tokens)
        self.attend(layer, q, k, by_head[:, :, 2], state, heads, scale=c.head_dim**-0.5)
        self.linear(prefix + "o", heads, out, bias=prefix + "o.bias")

    def _logits(self, hidden: np.ndarray, out: np.ndarray) -> None:
        normed = self.scratch.view("normed", hidden.shape[0])
        self.layer_norm(hidden, "final_norm", normed)
        self.linear(self.head_plane, normed, out)
