"""The Llama family: pre-norm RMSNorm, rotary attention with grouped queries, gated or plain FFN.

Covers Llama 2/3, Mistral (sliding window), Qwen2 (attention bias), Qwen3 (norms on q and k) and
Phi-3, with SiLU, ReLU or squared ReLU; families that widen it set the scale and the soft cap of
attention, the rope of a layer, and norms of what a sublayer adds.
"Llama 2", arXiv 2307.09288; grouped queries, arXiv 2305.13245.
"""

from __future__ import annotations

import numpy as np

from .decoder import DecoderModel, require_vector
from .rope_table import RopeTable


class LlamaModel(DecoderModel):
    def __init__(self, config, planes, vectors, store, kernels, *, max_tokens, n_context, path=""):
        super().__init__(
            config, planes, vectors, store, kernels, max_tokens=max_tokens, n_context=n_context
        )
        self.rope = RopeTable(config.rope, n_context)
        self.scale, self.cap = config.head_dim**-0.5, 0.0
        for layer in range(config.n_layers):
            for norm in config.layer_norms:
                name = f"layers.{layer}.{norm}.weight"
                require_vector(path, vectors, name, config.hidden_size)
            if config.qk_norm:
                for part, width in zip("qk", config.qk_norm_widths, strict=True):
                    require_vector(path, vectors, f"layers.{layer}.{part}_norm.weight", width)
        require_vector(path, vectors, "final_norm.weight", config.hidden_size)

    @classmethod
    def scratch_widths(cls, config) -> dict[str, int]:
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        ffn = config.intermediate_size
        return {
            "x": config.hidden_size,
            "normed": config.hidden_size,
            "residual": config.hidden_size,
            "qkv": q + 2 * kv,
            "heads": q,
            "queries": q,
            "keys": kv,
            "decided": ffn,
            "gathered": ffn,
            "up": ffn,
            "gate_up": 2 * ffn if config.gated and not config.sparse else 0,
        }

    @classmethod
    def widest_input(cls, config) -> int:
        return max(config.hidden_size, config.n_heads * config.head_dim)

    @classmethod
    def context_bytes(cls, config, n_context: int, dtype: np.dtype, kernels) -> int:
        table = RopeTable.bytes_needed(config.rope.n_rotated, n_context)
        return table + super().context_bytes(config, n_context, dtype, kernels)

    def _hidden(self, ids: np.ndarray, state) -> np.ndarray:
        c, n_tokens, view = self.config, ids.size, self.scratch.view
        x, normed, residual = (view(name, n_tokens) for name in ("x", "normed", "residual"))
        self.embed("embed", ids, x)
        self._norm(x, "layers.0.attn_norm", normed)
        for layer in range(c.n_layers):
            prefix, after = f"layers.{layer}.", f"layers.{layer + 1}.attn_norm"
            self._attention(layer, normed, state, residual)
            self._norm_added(prefix + "attn_post_norm", residual)
            self._add_norm(x, residual, prefix + "ffn_norm", normed)
            self.ffn(layer, normed, residual)
            self._norm_added(prefix + "ffn_post_norm", residual)
            if layer + 1 < c.n_layers:
                self._add_norm(x, residual, after, normed)
        x += residual
        return x

    def _norm_added(self, name: str, added: np.ndarray) -> None:
        """Norm, in place, of what a sublayer is about to add, where the family has one."""
        if name + ".weight" in self.vectors:
            self._norm(added, name, added)

    def rope_of(self, layer: int) -> RopeTable:
        return self.rope

    def _attention(self, layer: int, x: np.ndarray, state, out: np.ndarray) -> None:
        c, n_tokens, prefix = self.config, x.shape[0], f"layers.{layer}."
        n_q, n_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        qkv = self.scratch.view("qkv", n_tokens)
        self.linear(prefix + "qkv", x, qkv, bias=prefix + "qkv.bias")
        q, k = qkv[:, :n_q], qkv[:, n_q : n_q + n_kv]
        if n_tokens > 1:  # a token's lie in one piece
            rows_q, rows_k = q, k
            q, k = (self.scratch.view(name, n_tokens) for name in ("queries", "keys"))
            np.copyto(q, rows_q)
            np.copyto(k, rows_k)
        if c.qk_norm:
            q_width, k_width = c.qk_norm_widths
            self._norm(q.reshape(-1, q_width), prefix + "q_norm", q.reshape(-1, q_width))
            self._norm(k.reshape(-1, k_width), prefix + "k_norm", k.reshape(-1, k_width))
        q = q.reshape(n_tokens, c.n_heads, c.head_dim)
        k = k.reshape(n_tokens, c.n_kv_heads, c.head_dim)
        v = qkv[:, n_q + n_kv :].reshape(n_tokens, c.n_kv_heads, c.head_dim)
        rope = self.rope_of(layer).rows(state.positions(n_tokens))
        heads, window = self.scratch.view("heads", n_tokens), c.windows[layer]
        if n_tokens == 1:
            ((_, one),) = state.spans(1)
            self.kernels.attend_token(
                q, k, v, rope, one.keys[layer], one.values[layer], one.length, window, self.scale,
                heads, cap=self.cap,
            )  # fmt: skip
        else:
            self.kernels.rope(q, *rope)
            self.kernels.rope(k, *rope)
            self.attend(layer, q, k, v, state, heads, scale=self.scale, window=window, cap=self.cap)
        self.linear(prefix + "o", heads, out, bias=prefix + "o.bias")

    def _add_norm(self, x: np.ndarray, added: np.ndarray, name: str, out: np.ndarray) -> None:
        """x += added, and its `_norm`."""
        weight = self.vectors[name + ".weight"]
        self.kernels.add_rms_norm(x, added, weight, self.config.norm_eps, out)

    def _norm(self, x: np.ndarray, name: str, out: np.ndarray) -> None:
        self.kernels.rms_norm(x, self.vectors[name + ".weight"], self.config.norm_eps, out)

    def _logits(self, hidden: np.ndarray, out: np.ndarray) -> None:
        normed = self.scratch.view("normed", hidden.shape[0])
        self._norm(hidden, "final_norm", normed)
        self.linear(self.head_plane, normed, out)
