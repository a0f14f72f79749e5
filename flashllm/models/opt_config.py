"""The OPT family's config and tensor roles (Open Pre-trained Transformers, arXiv 2205.01068).

LayerNorm before or after each sublayer, learned positions (the table starts with two rows that are
never used), ungated FFN down(relu(up(x))), a tied head, and in one size embeddings narrower than
the hidden state with a projection in and out.
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


@dataclass(frozen=True, kw_only=True)
class OPTConfig(ModelConfig):
    """`embed_size`: width of the token embeddings; `norm_affine`: norms have weights and biases."""

    family: ClassVar[str] = "opt"
    model_types: ClassVar[tuple[str, ...]] = ("opt",)
    position_offset: ClassVar[int] = 2  # row of the position table that belongs to position 0

    embed_size: int
    norm_before: bool
    final_norm: bool
    bias: bool
    norm_affine: bool

    @property
    def projected(self) -> bool:
        """True where embeddings are projected to the hidden size and back."""
        return self.embed_size != self.hidden_size

    @classmethod
    def values_from_hf(cls, source: Fields, notes: list[str]) -> dict[str, Any]:
        vocab_size, hidden_size, n_layers, n_heads = hf_sizes(source)
        norm_before = source.flag("do_layer_norm_before", True)
        return {
            "model_type": source.text("model_type"),
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": source.integer("ffn_dim", 1, MAX_WIDTH),
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": n_heads,
            "head_dim": hf_head_dim(source, hidden_size, n_heads),
            "n_context": source.integer("max_position_embeddings", 1, MAX_CONTEXT, 2048),
            "norm_eps": 1e-5,  # fixed in the architecture, in no config key
            "activation": activation_name(source.text("activation_function", "relu")),
            "gated": False,
            "tied": source.flag("tie_word_embeddings", True),
            **hf_ends(source, vocab_size, notes),
            "embed_size": source.integer("word_embed_proj_dim", 1, MAX_WIDTH, hidden_size),
            "norm_before": norm_before,
            "final_norm": norm_before and not source.flag("_remove_final_layer_norm", False),
            "bias": source.flag("enable_bias", True),
            "norm_affine": source.flag("layer_norm_elementwise_affine", True),
        }

    @classmethod
    def values_from_dict(cls, source: Fields) -> dict[str, Any]:
        values = common_from_dict(source, cls.model_types)
        check_plain(source, values)
        values["embed_size"] = source.integer("embed_size", 1, MAX_WIDTH)
        for key in ("norm_before", "final_norm", "bias", "norm_affine"):
            values[key] = source.flag(key)
        return values

    def roles(self) -> Roles:
        h, e = self.hidden_size, self.embed_size
        head = ("lm_head.weight",)
        embedding = _names("embed_tokens.weight") + (head if self.tied else ())
        positions = (self.n_context + self.position_offset, h)
        use = "dense" if self.tied else "embed"
        planes = [
            rows("embed", TensorRole(embedding, (self.vocab_size, e)), use),
            rows("position", TensorRole(_names("embed_positions.weight"), positions), "embed"),
        ]
        vectors: list[VectorRole] = []
        if self.projected:
            planes.append(rows("project_in", _tensor("project_in.weight", h, e)))
        for i in range(self.n_layers):
            planes += self._layer_planes(i)
            vectors += self._layer_vectors(i)
        if self.final_norm:
            vectors += self._norm("final_norm", "final_layer_norm")
        if self.projected:
            planes.append(rows("project_out", _tensor("project_out.weight", e, h)))
        if not self.tied:
            planes.append(rows("head", TensorRole(head, (self.vocab_size, e))))
        # a tied checkpoint may repeat the matrix under the head's name
        return Roles(tuple(planes), tuple(vectors))

    def _layer_planes(self, i: int) -> list[PlaneRole]:
        h, n, attention = self.hidden_size, self.intermediate_size, f"layers.{i}.self_attn"
        qkv = tuple(
            (part, _tensor(f"{attention}.{part}_proj.weight", h, h)) for part in ("q", "k", "v")
        )
        pieces = (
            ("up", _tensor(f"layers.{i}.fc1.weight", n, h)),
            ("down", _tensor(f"layers.{i}.fc2.weight", h, n, transposed=True)),
        )
        return [
            PlaneRole(f"layers.{i}.qkv", "rows", "dense", qkv),
            rows(f"layers.{i}.o", _tensor(f"{attention}.out_proj.weight", h, h)),
            *ffn_planes(f"layers.{i}", pieces, sparse=self.sparse),
        ]

    def _layer_vectors(self, i: int) -> list[VectorRole]:
        layer, h, n = f"layers.{i}", self.hidden_size, self.intermediate_size
        vectors = self._norm(f"{layer}.attn_norm", f"{layer}.self_attn_layer_norm")
        vectors += self._norm(f"{layer}.ffn_norm", f"{layer}.final_layer_norm")
        if self.bias:
            first = "deciding" if self.sparse else "up"
            qkv = tuple(_tensor(f"{layer}.self_attn.{p}_proj.bias", h) for p in ("q", "k", "v"))
            vectors += [
                VectorRole(f"{layer}.qkv.bias", qkv),
                VectorRole(f"{layer}.o.bias", (_tensor(f"{layer}.self_attn.out_proj.bias", h),)),
                VectorRole(f"{layer}.{first}.bias", (_tensor(f"{layer}.fc1.bias", n),)),
                VectorRole(f"{layer}.ffn.bias", (_tensor(f"{layer}.fc2.bias", h),)),
            ]
        return vectors

    def _norm(self, ours: str, theirs: str) -> list[VectorRole]:
        if not self.norm_affine:
            return []
        width = self.hidden_size
        return affine_norm(
            ours, _tensor(f"{theirs}.weight", width), _tensor(f"{theirs}.bias", width)
        )


def _names(name: str) -> tuple[str, ...]:
    # published files exist with all three prefixes
    return (f"model.decoder.{name}", f"decoder.{name}", name)


def _tensor(name: str, *shape: int, transposed: bool = False) -> TensorRole:
    return TensorRole(_names(name), shape, transposed)

