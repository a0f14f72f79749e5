"""The Llama family: pre-norm RMSNorm, rotary attention with grouped queries, gated or plain FFN.

Covers Llama 2/3, Mistral (sliding window), Qwen2 (attention bias), Qwen3 (norms on q and k) and
Phi-3, with SiLU, ReLU or squared ReLU; families that widen it set the scale and the soft cap of
attention, the rope of a layer, and norms of what a sublayer adds.
"Llama 2", arXiv 2307.09288; grouped queries, arXiv 2305.13245.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from .decoder import DecoderModel, require_vector
from .repeats import Part, Repeats
from .rope_table import RopeTable


class LlamaModel(DecoderModel):
    def __init__(self, config, planes, vectors, store, kernels, *, max_tokens, n_context, path=""):
        super().__init__(
            config, planes, vectors, store, kernels, max_tokens=max_tokens, n_context=n_context
        )
        self.rope = RopeTable(config.rope, n_context)
        self.repeats, self.audited_repeats = Repeats(kernels), Repeats(kernels)
        # Layers whose FFNs end in what begun_ffn.py has, of the parts that `repeats` runs.
        self._whole_layers: list[int] = []
        self._streamed_layers: list[int] = []
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
        x, normed, residual = self._streams(ids.size)
        self.embed("embed", ids, x)
        if ids.size == 1:
            ((_, one),) = state.spans(1)
            audited = self._approximating and self.approximation.auditing
            (self.audited_repeats if audited else self.repeats).run(
                self, one, self._parts_key(), partial(self._parts, audited=audited),
                lambda: (x, normed, residual, *self.begun()),
            )  # fmt: skip
            self.count_begun(self._whole_layers, self._streamed_layers)
        else:
            for layer in range(self.config.n_layers):
                self._first_half(layer, ids.size, state)
                self._second_half(layer, ids.size, state)
        self._norm_added(f"layers.{self.config.n_layers - 1}.ffn_post_norm", residual)
        self.kernels.add(x, residual)
        return x

    def _streams(self, n_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What runs through the layers, its norm, and what is about to be added to it."""
        view = self.scratch.view
        return view("x", n_tokens), view("normed", n_tokens), view("residual", n_tokens)

    def _parts(self, plainly: bool = False, audited: bool = False) -> Iterator[Part]:
        """Of one token's pass through the layers.  `plainly`: nothing is chosen before it is asked
        for; `audited`: what has chosen is looked at."""
        whole: list[int] = []
        streamed: list[int] = []
        for layer in range(self.config.n_layers):
            where = {"layer": layer, "n_tokens": 1}
            begun = not plainly and self.ffn_begins(layer)
            yield Part(partial(LlamaModel._first_half, **where), self._attention_repeats(layer))
            is_whole = begun and self.ffn_is_whole(layer)
            choose = is_whole or begun and self.kernels.adds_arriving and self.ffn_chooses(layer)
            if begun:
                yield Part(partial(LlamaModel._between, layer=layer, choose=choose), True)
            if is_whole:
                whole.append(layer)
                yield Part(partial(LlamaModel._whole, layer=layer), True)
            elif choose:
                streamed.append(layer)
                yield Part(partial(LlamaModel._streamed, layer=layer))
            else:
                rest = partial(LlamaModel._second_half, **where, begun=begun)
                yield Part(rest, self._ffn_repeats(layer))
            if choose and audited and self.predictor_of(layer) is not None:
                yield Part(partial(LlamaModel._audit, layer=layer))
        if not plainly:
            self._whole_layers, self._streamed_layers = whole, streamed
            self._add_calls.clear()

    def _parts_key(self) -> tuple:
        """What decides which parts a token has and which of them may be repeated."""
        return self.store.n_resized, self.observer is None, self._approximating

    def _first_half(self, layer: int, n_tokens: int, state) -> None:
        """The FFN before it is added and normed; attention; the same of that."""
        x, normed, residual = self._streams(n_tokens)
        if layer == 0:
            self._norm(x, "layers.0.attn_norm", normed)
        else:
            self._norm_added(f"layers.{layer - 1}.ffn_post_norm", residual)
            self._add_norm(x, residual, f"layers.{layer}.attn_norm", normed)
        self._attention(layer, normed, state, residual)
        self._norm_added(f"layers.{layer}.attn_post_norm", residual)
        self._add_norm(x, residual, f"layers.{layer}.ffn_norm", normed)

    def _between(self, layer: int, choose: bool, state) -> None:
        """What one token's FFN begins with."""
        _, normed, residual = self._streams(1)
        self.begin_ffn(layer, normed, residual, choose=choose)

    def _whole(self, layer: int, state) -> None:
        """The rest of it where all of its weights are in memory."""
        self.whole_ffn(layer, self._streams(1)[2])

    def _streamed(self, layer: int, state) -> None:
        """The same where they are picked."""
        view = self.scratch.view
        self.streamed_ffn(layer, view("normed", 1), view("residual", 1))

    def _audit(self, layer: int, state) -> None:
        self.audit_begun(layer, self._streams(1)[1])

    def _second_half(self, layer: int, n_tokens: int, state, begun: bool = False) -> None:
        _, normed, residual = self._streams(n_tokens)
        self.ffn(layer, normed, residual, begun=begun)

    def _attention_repeats(self, layer: int) -> bool:
        """Whether the attention of one token calls operators only: its weights are in memory."""
        names = f"layers.{layer}.qkv", f"layers.{layer}.o"
        return all(self.store.held(name) is not None for name in names)

    def _ffn_repeats(self, layer: int) -> bool:
        """The same of `ffn`: what it calls must not depend on the token."""
        prefix = f"layers.{layer}."
        return (
            not self.config.sparse
            and self.approximation is None
            and self.observer is None
            and prefix + "deciding" not in self.planes
            and (prefix not in self._inner_biases or prefix + "down" in self.planes)
            and all(self.store.held(name) is not None for name in self.ffn_planes(layer))
        )

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
        table, heads = self.rope_of(layer), self.scratch.view("heads", n_tokens)
        window = c.windows[layer]
        if n_tokens == 1:
            ((_, one),) = state.spans(1)
            self.kernels.attend_token(
                q, k, v, (table.cos, table.sin), one.keys[layer], one.values[layer], one.length,
                window, self.scale, heads, cap=self.cap,
            )  # fmt: skip
        else:
            rope = table.rows(state.positions(n_tokens))
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
