"""The DeepSeek-V2 family's config and roles (arXiv 2405.04434): DeepSeek-V2-Lite and its like.

Experts beside a shared one that has no gate, after a first layer without, and latent attention:
keys and values of all heads are linear in one latent vector of the token, which is what is cached,
with the few dimensions that turn, which all heads share.  The matrix that makes keys and values of
a latent becomes two planes, because attention applies them at its two ends (deepseek.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UnsupportedError
from .base import PlaneRole, TensorRole, VectorRole, rows, rows_of
from .fields import MAX_LAYERS, MAX_WIDTH, Fields
from .llama_config import stem
from .moe_config import MAX_EXPERTS, MoEConfig
from .rope import rope_from_hf, rope_growth

MAX_HEADS_IN_ALL = 2**15  # published: 7808


@dataclass(frozen=True, kw_only=True)
class DeepSeekConfig(MoEConfig):
    """`head_dim` is what attention sees: `latent_size` and the rope's dimensions.

    `key_size`, `value_size`: a head's dimensions that do not turn, and those of its value; `scale`
    of the scores; `routed_scale`: factor of the routed experts' weights.
    """

    family: ClassVar[str] = "deepseek"
    model_types: ClassVar[tuple[str, ...]] = ("deepseek_v2",)
    shared_gated: ClassVar[bool] = False
    shared_expert: ClassVar[str] = "shared_experts"

    latent_size: int
    key_size: int
    value_size: int
    scale: float
    routed_scale: float

    @classmethod
    def values_from_hf(cls, source: Fields, notes: list[str]) -> dict[str, Any]:
        _refuse(source)
        latent = source.integer("kv_lora_rank", 1, 2**14, 512)
        rotated = source.integer("qk_rope_head_dim", 2, 2**14, 64)
        key_size = source.integer("qk_nope_head_dim", 1, 2**14, 128)
        expert = source.integer("moe_intermediate_size", 1, MAX_WIDTH, 1407)
        n_shared = source.integer("n_shared_experts", 0, MAX_EXPERTS, 0)
        first = source.integer("first_k_dense_replace", 0, MAX_LAYERS, 0)
        translated = {
            **source.raw,
            "head_dim": latent + rotated, "num_key_value_heads": 1, "partial_rotary_factor": None,
            "num_experts": source.integer("n_routed_experts", 1, MAX_EXPERTS, 64),
            "shared_expert_intermediate_size": max(1, n_shared) * expert,
            "mlp_only_layers": list(range(first)), "decoder_sparse_step": 1,
        }  # fmt: skip
        values = super().values_from_hf(Fields(translated, source.path, source.error), notes)
        rope = rope_from_hf(source, rotated, values["n_context"])
        # attention's own use of YaRN's factor, beside that of cos and sin
        sharper = 1.0
        stated = source.sub("rope_parameters") or source.sub("rope_scaling")
        if rope.kind != "default" and stated is not None:
            sharper = rope_growth(rope.factor, stated.number("mscale_all_dim", 0.0, 1e3, 0.0)) ** 2
        return values | {
            "rope": rope,
            "shared_size": n_shared * expert,
            "latent_size": latent,
            "key_size": key_size,
            "value_size": source.integer("v_head_dim", 1, 2**14, 128),
            "scale": (key_size + rotated) ** -0.5 * sharper,
            "routed_scale": source.number("routed_scaling_factor", 1e-6, 1e6, 1.0),
        }

    @classmethod
    def values_from_dict(cls, source: Fields) -> dict[str, Any]:
        values = super().values_from_dict(source)
        for key in ("latent_size", "key_size", "value_size"):
            values[key] = source.integer(key, 1, 2**14)
        heads = values["n_heads"] * values["n_layers"]
        if heads > MAX_HEADS_IN_ALL:
            raise source.fail("heads in all", f"at most {MAX_HEADS_IN_ALL}", heads)
        values["scale"] = source.number("scale", 1e-6, 1e6)
        values["routed_scale"] = source.number("routed_scale", 1e-6, 1e6)
        latent = values["head_dim"] - values["rope"].n_rotated
        if values["latent_size"] != latent or values["n_kv_heads"] != 1:
            raise source.fail("latent_size", f"{latent} beside one key head", values["latent_size"])
        return values

    def _layer_planes(self, i: int, n_q: int) -> list[PlaneRole]:
        others = super()._layer_planes(i, n_q)
        h, layer = self.hidden_size, f"layers.{i}"
        attention = f"{layer}.self_attn"
        n_key = self.key_size + self.rope.n_rotated
        projections = (
            ("q", self._tensor(f"{attention}.q_proj.weight", self.n_heads * n_key, h)),
            ("kv", self._tensor(f"{attention}.kv_a_proj_with_mqa.weight", self.head_dim, h)),
        )
        output = self._tensor(f"{attention}.o_proj.weight", h, self.n_heads * self.value_size)
        return [
            PlaneRole(f"{layer}.qkv", "rows", "dense", projections),
            self._by_head(f"{layer}.key_up", attention, 0, self.key_size),
            self._by_head(f"{layer}.value_up", attention, self.key_size, self.value_size),
            rows(f"{layer}.o", output),
            *(plane for plane in others if not plane.name.endswith((".qkv", ".o"))),
        ]

    def _by_head(self, name: str, attention: str, first: int, n: int) -> PlaneRole:
        """Every head's rows first .. first+n-1 of the matrix of keys and values."""
        each = self.key_size + self.value_size
        names = stem(f"{attention}.kv_b_proj.weight")
        parts = []
        for head in range(self.n_heads):
            part = rows_of(names, head * each + first, n, self.n_heads * each)
            parts.append((str(head), TensorRole(part, (n, self.latent_size))))
        return PlaneRole(name, "rows", "dense", tuple(parts))

    def _layer_vectors(self, i: int, n_q: int) -> list[VectorRole]:
        norm = self._tensor(f"layers.{i}.self_attn.kv_a_layernorm.weight", self.latent_size)
        return [
            *super()._layer_vectors(i, n_q),
            VectorRole(f"layers.{i}.latent_norm.weight", (norm,)),
        ]

    @staticmethod
    def _tensor(name: str, *shape: int) -> TensorRole:
        return TensorRole(stem(name), shape)


def _refuse(source: Fields) -> None:
    """UnsupportedError, in a sentence, for what the larger models of the family have."""
    refused = {
        "queries through a low-rank projection (q_lora_rank)":
            "q_lora_rank" not in source.raw or source.get("q_lora_rank") is not None,
        "choosing experts by groups (topk_method)":
            source.text("topk_method", "greedy") != "greedy",
        "normalised weights of chosen experts (norm_topk_prob)":
            source.flag("norm_topk_prob", False),
        "scores other than softmax (scoring_func)":
            source.text("scoring_func", "softmax") != "softmax",
        "attention biases": source.flag("attention_bias", False),
        "experts in some layers only (moe_layer_freq)":
            source.integer("moe_layer_freq", 1, MAX_LAYERS, 1) != 1,
    }  # fmt: skip
    for what, present in refused.items():
        if present:
            raise UnsupportedError(f"{source.path}: {what} is not supported for DeepSeek-V2")
