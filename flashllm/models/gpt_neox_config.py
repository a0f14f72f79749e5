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
    # what the checkpoints call things; families of the same layers call them otherwise
    stem: ClassVar[str] = "gpt_neox."
    layer_stem: ClassVar[str] = "layers"
    attention: ClassVar[str] = "attention"
    embedding: ClassVar[str] = "embed_in"
    last_norm: ClassVar[str] = "final_layer_norm"
    heads: ClassVar[tuple[str, ...]] = ("embed_out.weight", "lm_head.weight")

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

    @property
    def ffn_bias(self) -> bool:
        return True

    @property
    def layer_norms(self) -> dict[str, str]:
        """Our names of a layer's norms, and the checkpoint's."""
        return {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}

    @property
    def qkv_rows(self) -> int:
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    def roles(self) -> Roles:
        vocab = (self.vocab_size, self.hidden_size)
        embedding = self._names(f"{self.embedding}.weight") + (self.heads if self.tied else ())
        planes = [rows("embed", TensorRole(embedding, vocab), "dense" if self.tied else "embed")]
        vectors: list[VectorRole] = []
        for i in range(self.n_layers):
            planes += self._layer_planes(i)
            vectors += self._layer_vectors(i)
        vectors += self._norm("final_norm", self.last_norm)
        if not self.tied:
            planes.append(rows("head", TensorRole(self.heads, vocab)))
        # older checkpoints carry their causal mask and frequencies
        ignored = rf".*\.{self.attention}\.(bias|masked_bias|rotary_emb\.inv_freq)"
        return Roles(tuple(planes), tuple(vectors), (ignored,))

    def _layer_planes(self, i: int) -> list[PlaneRole]:
        h, n, theirs = self.hidden_size, self.intermediate_size, f"{self.layer_stem}.{i}"
        attention, mlp, layer = f"{theirs}.{self.attention}", f"{theirs}.mlp", f"layers.{i}"
        qkv = self._tensor(f"{attention}.query_key_value.weight", self.qkv_rows, h)
        pieces = (
            ("up", self._tensor(f"{mlp}.dense_h_to_4h.weight", n, h)),
            ("down", self._tensor(f"{mlp}.dense_4h_to_h.weight", h, n, transposed=True)),
        )
        return [
            rows(f"{layer}.qkv", qkv),
            rows(f"{layer}.o", self._tensor(f"{attention}.dense.weight", h, h)),
            *ffn_planes(layer, pieces, sparse=self.sparse),
        ]

    def _layer_vectors(self, i: int) -> list[VectorRole]:
        h, layer, theirs = self.hidden_size, f"layers.{i}", f"{self.layer_stem}.{i}"
        biases = {}
        if self.ffn_bias:
            biases["deciding" if self.sparse else "up"] = (
                "mlp.dense_h_to_4h", self.intermediate_size,
            )  # fmt: skip
            biases["ffn"] = ("mlp.dense_4h_to_h", h)
        if self.bias:
            biases["qkv"] = (f"{self.attention}.query_key_value", self.qkv_rows)
            biases["o"] = (f"{self.attention}.dense", h)
        norms = [self._norm(f"{layer}.{ours}", f"{theirs}.{name}")
                 for ours, name in self.layer_norms.items()]  # fmt: skip
        return [
            *(vector for norm in norms for vector in norm),
            *(
                VectorRole(f"{layer}.{ours}.bias", (self._tensor(f"{theirs}.{name}.bias", n),))
                for ours, (name, n) in biases.items()
            ),
        ]

    def _norm(self, ours: str, theirs: str) -> list[VectorRole]:
        width = self.hidden_size
        return affine_norm(
            ours, self._tensor(f"{theirs}.weight", width), self._tensor(f"{theirs}.bias", width)
        )

    def _names(self, name: str) -> tuple[str, ...]:
        return (self.stem + name, name)

    def _tensor(self, name: str, *shape: int, transposed: bool = False) -> TensorRole:
        return TensorRole(self._names(name), shape, transposed)


def _newer_spelling(source: Fields) -> Fields:
    """Rotary keys as `rope_from_hf` knows them; a quarter of each head turns by default."""
    older = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    raw = {"partial_rotary_factor": 0.25, **source.raw}
    raw |= {new: source.raw[old] for old, new in older.items() if source.get(old) is not None}
    return Fields(raw, source.path, source.error)
