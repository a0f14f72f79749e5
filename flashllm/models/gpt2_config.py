"""The GPT-2 family's config and roles ("Language Models are Unsupervised Multitask Learners").

OPT's layers with norms before each sublayer, positions counted from row 0, and matrices that are
stored [inputs, outputs]: their items are columns, and a neuron's down piece is a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UnsupportedError
from .base import (
    PlaneRole,
    Roles,
    TensorRole,
    VectorRole,
    activation_name,
    affine_norm,
    ffn_planes,
    hf_ends,
    hf_head_dim,
    rows,
)
from .fields import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH, Fields
from .opt_config import OPTConfig

_REFUSED = {  # option -> the only value that is computed
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


@dataclass(frozen=True, kw_only=True)
class GPT2Config(OPTConfig):
    family: ClassVar[str] = "gpt2"
    model_types: ClassVar[tuple[str, ...]] = ("gpt2",)
    position_offset: ClassVar[int] = 0

    @classmethod
    def values_from_hf(cls, source: Fields, notes: list[str]) -> dict[str, Any]:
        for key, value in _REFUSED.items():
            if source.flag(key, value) is not value:
                raise UnsupportedError(f"{source.path}: {key} {not value} is not supported")
        vocab_size = source.integer("vocab_size", 1, MAX_VOCAB, 50257)
        hidden_size = source.integer("n_embd", 1, MAX_WIDTH, 768)
        n_heads = source.integer("n_head", 1, MAX_HEADS, 12)
        return {
            "model_type": source.text("model_type"),
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": source.integer("n_inner", 1, MAX_WIDTH, 4 * hidden_size),
            "n_layers": source.integer("n_layer", 1, MAX_LAYERS, 12),
            "n_heads": n_heads,
            "n_kv_heads": n_heads,
            "head_dim": hf_head_dim(source, hidden_size, n_heads, "n_embd"),
            "n_context": source.integer("n_positions", 1, MAX_CONTEXT, 1024),
            "norm_eps": source.number("layer_norm_epsilon", 0.0, 1.0, 1e-5),
            "activation": activation_name(source.text("activation_function", "gelu_new")),
            "gated": False,
            "tied": source.flag("tie_word_embeddings", True),
            **hf_ends(source, vocab_size, notes),
            "embed_size": hidden_size,
            "norm_before": True,
            "final_norm": True,
            "bias": True,
            "norm_affine": True,
        }

    def roles(self) -> Roles:
        h, head = self.hidden_size, ("lm_head.weight",)
        vocab = (self.vocab_size, h)
        embedding = TensorRole(_names("wte.weight") + (head if self.tied else ()), vocab)
        positions = _tensor("wpe.weight", self.n_context, h)
        planes = [
            rows("embed", embedding, "dense" if self.tied else "embed"),
            rows("position", positions, "embed"),
        ]
        vectors = []
        for i in range(self.n_layers):
            planes += self._layer_planes(i)
            vectors += self._layer_vectors(i)
        vectors += self._norm("final_norm", "ln_f")
        if not self.tied:
            planes.append(rows("head", TensorRole(head, vocab)))
        # causal masks of older checkpoints
        return Roles(tuple(planes), tuple(vectors), (r".*\.attn\.(bias|masked_bias)",))

    def _layer_planes(self, i: int) -> list[PlaneRole]:
        h, n, layer = self.hidden_size, self.intermediate_size, f"layers.{i}"
        attention, mlp = f"h.{i}.attn", f"h.{i}.mlp"
        pieces = (
            ("up", _tensor(f"{mlp}.c_fc.weight", h, n, transposed=True)),
            ("down", _tensor(f"{mlp}.c_proj.weight", n, h)),
        )
        return [
            rows(f"{layer}.qkv", _tensor(f"{attention}.c_attn.weight", h, 3 * h, transposed=True)),
            rows(f"{layer}.o", _tensor(f"{attention}.c_proj.weight", h, h, transposed=True)),
            *ffn_planes(layer, pieces, sparse=self.sparse),
        ]

    def _layer_vectors(self, i: int) -> list[VectorRole]:
        h, n, layer = self.hidden_size, self.intermediate_size, f"layers.{i}"
        first = "deciding" if self.sparse else "up"
        biases = {"qkv": ("attn.c_attn", 3 * h), "o": ("attn.c_proj", h),
                  first: ("mlp.c_fc", n), "ffn": ("mlp.c_proj", h)}  # fmt: skip
        return [
            *self._norm(f"{layer}.attn_norm", f"h.{i}.ln_1"),
            *self._norm(f"{layer}.ffn_norm", f"h.{i}.ln_2"),
            *(
                VectorRole(f"{layer}.{ours}.bias", (_tensor(f"h.{i}.{theirs}.bias", length),))
                for ours, (theirs, length) in biases.items()
            ),
        ]

    def _norm(self, ours: str, theirs: str) -> list[VectorRole]:
        width = self.hidden_size
        return affine_norm(
            ours, _tensor(f"{theirs}.weight", width), _tensor(f"{theirs}.bias", width)
        )


def _names(name: str) -> tuple[str, ...]:
    return (f"transformer.{name}", name)


def _tensor(name: str, *shape: int, transposed: bool = False) -> TensorRole:
    return TensorRole(_names(name), shape, transposed)
