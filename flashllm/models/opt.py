"""OPT (arXiv 2205.01068) and GPT-2: learned positions, LayerNorm with bias, FFN of two matrices.

`norm_before` false is the 350M variant (norms after the residual sums, no final norm), whose
embedding width also differs from the hidden size and is projected in and out.
"""

from __future__ import annotations

import numpy as np

from .decoder import DecoderModel


class OPTModel(DecoderModel):
    def __init__(self, config, planes, vectors, store, kernels, *, max_tokens, n_context, path=""):
        super().__init__(
            config, planes, vectors, store, kernels, max_tokens=max_tokens, n_context=n_context
        )
        first = config.position_offset
        self._position_rows = np.arange(first, first + n_context, dtype=np.int32)
        self._ones = np.ones(config.hidden_size, np.float32)
        self._zeros = np.zeros(config.hidden_size, np.float32)

    @classmethod
    def scratch_widths(cls, config) -> dict[str, int]:
        return {
            "x": config.hidden_size,
            "normed": config.hidden_size,
            "residual": config.hidden_size,
            "embedded": config.embed_size,
            "qkv": 3 * config.hidden_size,
            "queries": config.hidden_size,
            "heads": config.hidden_size,
            "decided": config.intermediate_size,
            "gathered": config.intermediate_size,
        }

    @classmethod
    def widest_input(cls, config) -> int:
        return max(config.hidden_size, config.embed_size)

    def order(self, *, with_head: bool = True) -> tuple[str, ...]:
        first = ("project_in",) if "project_in" in self.planes else ()
        return first + super().order(with_head=with_head)

    def head_planes(self) -> list[str]:
        projected = ["project_out"] if "project_out" in self.planes else []
        return [*projected, self.head_plane]

    def _hidden(self, ids: np.ndarray, state) -> np.ndarray:
        c, n_tokens, view = self.config, ids.size, self.scratch.view
        x, normed, residual = (view(name, n_tokens) for name in ("x", "normed", "residual"))
        embedded = view("embedded", n_tokens)
        self.embed("embed", ids, embedded)
        if "project_in" in self.planes:
            self.linear("project_in", embedded, x)
        else:
            np.copyto(x, embedded)
        self.embed("position", self._position_rows[state.positions(n_tokens)], residual)
        x += residual
        for layer in range(c.n_layers):
            prefix = f"layers.{layer}."
            self._attention_block(prefix, layer, x, normed, residual, state)
            self._ffn_block(prefix, layer, x, normed, residual)
        return x

    def _attention_block(self, prefix, layer, x, normed, residual, state) -> None:
        self._before(prefix + "attn_norm", x, normed)
        c, n_tokens = self.config, x.shape[0]
        qkv = self.scratch.view("qkv", n_tokens)
        self.linear(prefix + "qkv", normed, qkv, bias=prefix + "qkv.bias")
        q = self.scratch.view("queries", n_tokens)
        np.copyto(q, qkv[:, : c.hidden_size])
        split = (n_tokens, c.n_heads, c.head_dim)
        k = qkv[:, c.hidden_size : 2 * c.hidden_size].reshape(split)
        v = qkv[:, 2 * c.hidden_size :].reshape(split)
        heads = self.scratch.view("heads", n_tokens)
        self.attend(layer, q.reshape(split), k, v, state, heads, scale=c.head_dim**-0.5)
        self.linear(prefix + "o", heads, residual, bias=prefix + "o.bias")
        x += residual
        self._after(prefix + "attn_norm", x)

    def _ffn_block(self, prefix, layer, x, normed, residual) -> None:
        self._before(prefix + "ffn_norm", x, normed)
        self.ffn(layer, normed, residual)
        x += residual
        self._after(prefix + "ffn_norm", x)

    def _before(self, name: str, x: np.ndarray, normed: np.ndarray) -> None:
        if self.config.norm_before:
            self._norm(x, name, normed)
        else:
            np.copyto(normed, x)

    def _after(self, name: str, x: np.ndarray) -> None:
        if not self.config.norm_before:
            self._norm(x, name, x)

    def _norm(self, x: np.ndarray, name: str, out: np.ndarray) -> None:
        weight = self.vectors.get(name + ".weight", self._ones)
        bias = self.vectors.get(name + ".bias", self._zeros)
        self.kernels.layer_norm(x, weight, bias, self.config.norm_eps, out)

    def _logits(self, hidden: np.ndarray, out: np.ndarray) -> None:
        n_tokens = hidden.shape[0]
        if self.config.final_norm:
            normed = self.scratch.view("normed", n_tokens)
            self._norm(hidden, "final_norm", normed)
            hidden = normed
        if "project_out" in self.planes:
            embedded = self.scratch.view("embedded", n_tokens)
            self.linear("project_out", hidden, embedded)
            hidden = embedded
        self.linear(self.head_plane, hidden, out)
