"""The GPT-NeoX family's config and tensor roles: GPT-NeoX-20B and Pythia (arXiv 2204.06745).

LayerNorms with bias, rotary attention over part of each head, one matrix for queries, keys and
values whose rows are grouped by head, an ungated FFN, and, unless the config says otherwise,
attention and FFN side by side: both read the layer's input and are added to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import (
    ModelConfig,
    PlaneRole,
    Roles,
    TensorRole,
    VectorRole,
    activation_name,
    affine_norm,
    check_plain,
    common_from_dict,
    ffn_planes,
    hf_ends,
    hf_head_dim,
    hf_sizes,
    rows,
)
from .fields import MAX_CONTEXT, MAX_WIDTH, Fields
from .rope import Rope, rope_from_dict, rope_from_hf


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(ModelConfig):
    """`parallel`: attention and FFN side by side; `bias`: attention has biases (the FFN always)."""

    family: ClassVar[str] = "gpt_neox"
    model_types: ClassVar[tuple[str, ...]] = ("gpt_neox",)

    rope: Rope
    parallel: bool
    bias: bool

    @classmethod
    def values_from_hf(cls, source: Fields, notes: list[str]) -> dict[str, Any]:
        vocab_size, hidden_size, n_layers, n_heads = hf_sizes(source)
        head_dim = hf_head_dim(source, hidden_size, n_heads)
        n_context = source.integer("max_position_embeddings", 1, MAX_CONTEXT, 2048)
        return {
            "model_type": source.text("model_type"),
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": source.integer("intermediate_size", 1, MAX_WIDTH),
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": n_heads,
            "head_dim": head_dim,
            "n_context": n_context,
            "norm_eps": source.number("layer_norm_eps", 0.0, 1.0, 1e-5),
            "activation": activation_name(source.text("hidden_act", "gelu")),
            "gated": False,
            "tied": source.flag("tie_word_embeddings", False),
            **hf_ends(source, vocab_size, notes),
            "rope": rope_from_hf(_newer_spelling(source), head_dim, n_context),
            "parallel": source.flag("use_parallel_residual", True),
            "bias": source.flag("attention_bias", True),
        }

    @classmethod
    def values_from_dict(cls, source: Fields) -> dict[str, Any]:
        values = common_from_dict(source, cls.model_types)
        check_plain(source, values)
        values["rope"] = rope_from_dict(source, values["head_dim"])
        values["parallel"], values["bias"] = source.flag("parallel"), source.flag("bias")
        return values

    def roles(self) -> Roles:
        vocab = (self.vocab_size, self.hidden_size)
        head = ("embed_out.weight", "lm_head.weight")
        embedding = _names("embed_in.weight") + (head if self.tied else ())
        use = "dense" if self.tied else "embed"
        planes = [rows("embed", TensorRole(embedding, vocab), use)]
        vectors: list[VectorRole] = []
        for i in range(self.n_layers):
            planes += self._layer_planes(i)
            vectors += self._layer_vectors(i)
        vectors += self._norm("final_norm", "final_layer_norm")
        if not self.tied:
            planes.append(rows("head", TensorRole(head, vocab)))
        # older checkpoints carry their causal mask and frequencies
        ignored = r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
        return Roles(tuple(planes), tuple(vectors), (ignored,))

    def _layer_planes(self, i: int) -> list[PlaneRole]:
        h, n, layer = self.hidden_size, self.intermediate_size, f"layers.{i}"
        attention, mlp = f"{layer}.attention", f"{layer}.mlp"
        pieces = (
            ("up", _tensor(f"{mlp}.dense_h_to_4h.weight", n, h)),
            ("down", _tensor(f"{mlp}.dense_4h_to_h.weight", h, n, transposed=True)),
        )
        return [
            rows(f"{layer}.qkv", _tensor(f"{attention}.query_key_value.weight", 3 * h, h)),
            rows(f"{layer}.o", _tensor(f"{attention}.dense.weight", h, h)),
            *ffn_planes(layer, pieces, sparse=self.sparse),
        ]

    def _layer_vectors(self, i: int) -> list[VectorRole]:
        h, n, layer = self.hidden_size, self.intermediate_size, f"layers.{i}"
        first = "deciding" if self.sparse else "up"
        biases = {first: (f"{layer}.mlp.dense_h_to_4h.bias", n),
                  "ffn": (f"{layer}.mlp.dense_4h_to_h.bias", h)}  # fmt: skip
        if self.bias:
            biases["qkv"] = (f"{layer}.attention.query_key_value.bias", 3 * h)
            biases["o"] = (f"{layer}.attention.dense.bias", h)
        return [
            *self._norm(f"{layer}.attn_norm", f"{layer}.input_layernorm"),
            *self._norm(f"{layer}.ffn_norm", f"{layer}.post_attention_layernorm"),
            *(
                VectorRole(f"{layer}.{ours}.bias", (_tensor(name, length),))
                for ours, (name, length) in biases.items()
            ),
        ]

    def _norm(self, ours: str, theirs: str) -> list[VectorRole]:
        width = self.hidden_size
        return affine_norm(
            ours, _tensor(f"{theirs}.weight", width), _tensor(f"{theirs}.bias", width)
        )


def _newer_spelling(source: Fields) -> Fields:
    """Rotary keys as `rope_from_hf` knows them; a quarter of each head turns by default."""
    older = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    raw = {"partial_rotary_factor": 0.25, **source.raw}
    raw |= {new: source.raw[old] for old, new in older.items() if source.get(old) is not None}
    return Fields(raw, source.path, source.error)


def _names(name: str) -> tuple[str, ...]:
    return (f"gpt_neox.{name}", name)


def _tensor(name: str, *shape: int, transposed: bool = False) -> TensorRole:
    return TensorRole(_names(name), shape, transposed)
