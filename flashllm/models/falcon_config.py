"""The Falcon family's config and roles (arXiv 2311.16867), and its ReLU versions.

GPT-NeoX's layers with fewer key heads than heads: one in the first models (multi-query), one to a
group of queries in the newer ones; the rows of the one matrix are a group's queries, its key, its
value.  Attention and FFN side by side read one norm or have one each.  An activation of ReLU makes
it the naturally sparse model that "LLM in a flash" measured beside OPT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UnsupportedError
from .base import activation_name, check_plain, common_from_dict, hf_ends, hf_head_dim, hf_sizes
from .fields import MAX_CONTEXT, MAX_HEADS, MAX_WIDTH, Fields
from .gpt_neox_config import GPTNeoXConfig
from .rope import rope_from_dict, rope_from_hf


@dataclass(frozen=True, kw_only=True)
class FalconConfig(GPTNeoXConfig):
    """`n_norms` of a layer: 1 is shared by attention and FFN.  `bias`: of every matrix but norms.

    `new_norm_names`: as in the newer models, where both norms are named by what reads them.
    """

    family: ClassVar[str] = "falcon"
    model_types: ClassVar[tuple[str, ...]] = ("falcon",)
    stem: ClassVar[str] = "transformer."
    layer_stem: ClassVar[str] = "h"
    attention: ClassVar[str] = "self_attention"
    embedding: ClassVar[str] = "word_embeddings"
    last_norm: ClassVar[str] = "ln_f"
    heads: ClassVar[tuple[str, ...]] = ("lm_head.weight",)

    n_norms: int
    new_norm_names: bool

    @classmethod
    def values_from_hf(cls, source: Fields, notes: list[str]) -> dict[str, Any]:
        if source.flag("alibi", False):
            raise UnsupportedError(f"{source.path}: positions by ALiBi are not supported")
        vocab_size, hidden_size, n_layers, n_heads = hf_sizes(source)
        head_dim = hf_head_dim(source, hidden_size, n_heads)
        n_context = source.integer("max_position_embeddings", 1, MAX_CONTEXT, 2048)
        newer = source.flag("new_decoder_architecture", False)
        parallel = newer or source.flag("parallel_attn", True)
        if newer:
            n_kv_heads = source.integer("num_kv_heads", 1, MAX_HEADS, n_heads)
            n_norms = source.integer("num_ln_in_parallel_attn", 1, 2, 2)
        else:
            n_kv_heads = 1 if source.flag("multi_query", True) else n_heads
            n_norms = 1 if parallel else 2
        if n_heads % n_kv_heads:
            raise source.fail("num_kv_heads", f"a divisor of {n_heads} heads", n_kv_heads)
        return {
            "model_type": source.text("model_type"),
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": source.integer("ffn_hidden_size", 1, MAX_WIDTH, 4 * hidden_size),
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "head_dim": head_dim,
            "n_context": n_context,
            "norm_eps": source.number("layer_norm_epsilon", 0.0, 1.0, 1e-5),
            "activation": activation_name(source.text("activation", "gelu")),
            "gated": False,
            "tied": source.flag("tie_word_embeddings", True),
            **hf_ends(source, vocab_size, notes),
            "rope": rope_from_hf(source, head_dim, n_context),
            "parallel": parallel,
            "bias": source.flag("bias", False),
            "n_norms": n_norms,
            "new_norm_names": newer and n_norms == 2,
        }

    @classmethod
    def values_from_dict(cls, source: Fields) -> dict[str, Any]:
        values = common_from_dict(source, cls.model_types)
        check_plain(source, values, grouped=True)
        values["rope"] = rope_from_dict(source, values["head_dim"])
        values["n_norms"] = source.integer("n_norms", 1, 2)
        for key in ("parallel", "bias", "new_norm_names"):
            values[key] = source.flag(key)
        if values["n_norms"] == 1 and not values["parallel"]:
            raise source.fail("n_norms", "2 where the FFN follows attention", 1)
        return values

    @property
    def ffn_bias(self) -> bool:
        return self.bias

    @property
    def layer_norms(self) -> dict[str, str]:
        if self.n_norms == 1:
            return {"attn_norm": "input_layernorm"}
        if self.new_norm_names:
            return {"attn_norm": "ln_attn", "ffn_norm": "ln_mlp"}
        return super().layer_norms
