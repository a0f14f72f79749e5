"""The Gemma family's config and roles: Gemma, Gemma 2 and the text models of Gemma 3
(arXiv 2403.08295, 2408.00118, 2503.19786).

Llama's layers with RMSNorms whose weight is stored less one, a scaled embedding and a gated
tanh-GELU FFN.  From Gemma 2 on, what a sublayer adds is normed too, some layers attend through a
window, and attention has a scale of its own; Gemma 2 caps scores and logits softly, Gemma 3 norms q
and k and turns them faster in the windowed layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UnsupportedError
from .fields import MAX_CONTEXT, MAX_LAYERS, Fields
from .llama_config import LlamaConfig, typed_windows
from .rope import Rope, rope_from_dict, rope_from_hf

_GLOBAL_THETA = {"gemma3_text": 1e6}
_LOCAL_THETA = 1e4
# where config.json is silent; null there means none
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_EVERY = {"gemma2": 2, "gemma3_text": 6}  # layer that sees everything, unless layer_types says


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(LlamaConfig):
    """`query_scalar`: scores are scaled by its inverse root; caps are 0 where there is none.

    `sandwich`: what a sublayer adds is normed.  `local_rope` is that of layers with a window.
    """

    family: ClassVar[str] = "gemma"
    model_types: ClassVar[tuple[str, ...]] = ("gemma", "gemma2", "gemma3_text")

    query_scalar: float
    attention_cap: float
    logit_cap: float
    sandwich: bool
    local_rope: Rope

    @classmethod
    def values_from_hf(cls, source: Fields, notes: list[str]) -> dict[str, Any]:
        model_type = source.text("model_type")
        if source.flag("use_bidirectional_attention", False):
            raise UnsupportedError(f"{source.path}: bidirectional attention is not supported")
        every, local = _ropes(source, model_type)
        activation = source.text("hidden_activation", source.text("hidden_act", "gelu"))
        common = {
            "head_dim": 256, "tie_word_embeddings": True, **_set(source),
            # "gelu" of the first configs means the tanh form, as it was trained
            "hidden_act": "gelu_tanh" if activation == "gelu" else activation,
            "rope_parameters": every,
        }  # fmt: skip
        values = super().values_from_hf(Fields(common, source.path, source.error), notes)
        n_layers, head_dim = values["n_layers"], values["head_dim"]
        bias = source.flag("attention_bias", False)
        values |= {
            "qkv_bias": bias,
            "o_bias": bias,
            "qk_norm": model_type == "gemma3_text",
            "query_scalar": float(head_dim),
            "attention_cap": 0.0,
            "logit_cap": 0.0,
            "sandwich": model_type != "gemma",
            "local_rope": values["rope"],
        }
        if model_type == "gemma":
            return values
        values["query_scalar"] = source.number("query_pre_attn_scalar", 1e-3, 1e9, 256)
        values["windows"] = _windows(source, model_type, n_layers, notes)
        values["attention_cap"] = _cap(source, "attn_logit_softcapping", model_type)
        values["logit_cap"] = _cap(source, "final_logit_softcapping", model_type)
        if model_type == "gemma3_text":
            if values["attention_cap"]:
                raise UnsupportedError(f"{source.path}: capped scores in Gemma 3 are not supported")
            raw = Fields({**common, "rope_parameters": local}, source.path, source.error)
            values["local_rope"] = rope_from_hf(raw, head_dim, values["n_context"])
        return values

    @classmethod
    def values_from_dict(cls, source: Fields) -> dict[str, Any]:
        values = super().values_from_dict(source)
        return {
            **values,
            "query_scalar": source.number("query_scalar", 1e-3, 1e9),
            "attention_cap": source.number("attention_cap", 0.0, 1e6),
            "logit_cap": source.number("logit_cap", 0.0, 1e6),
            "sandwich": source.flag("sandwich"),
            "local_rope": rope_from_dict(source, values["head_dim"], "local_rope"),
        }

    @property
    def layer_norms(self) -> dict[str, str]:
        if not self.sandwich:
            return super().layer_norms
        return {
            "attn_norm": "input_layernorm",
            "attn_post_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "ffn_post_norm": "post_feedforward_layernorm",
        }


def _set(source: Fields) -> dict[str, Any]:
    return {key: value for key, value in source.raw.items() if value is not None}


def _ropes(source: Fields, model_type: str) -> tuple[dict, dict]:
    """The rope dictionaries of layers that see everything and of those with a window."""
    base = source.number("rope_theta", 1.0, 1e15, _GLOBAL_THETA.get(model_type, 1e4))
    local_base = source.number("rope_local_base_freq", 1.0, 1e15, _LOCAL_THETA)
    stated = source.sub("rope_parameters") or Fields({}, source.path, source.error)
    if model_type == "gemma3_text":
        every = stated.sub("full_attention") or source.sub("rope_scaling")
        local = stated.sub("sliding_attention")
        every, local = (_set(rope) if rope else {} for rope in (every, local))
        return {"rope_theta": base, **every}, {"rope_theta": local_base, **local}
    every = _set(stated) or _set(source.sub("rope_scaling") or stated)
    return {"rope_theta": base, **every}, {}


def _cap(source: Fields, key: str, model_type: str) -> float:
    absent = _CAPS[key] if model_type == "gemma2" and key not in source.raw else 0.0
    return source.number(key, 0.0, 1e6, absent)


def _windows(
    source: Fields, model_type: str, n_layers: int, notes: list[str]
) -> tuple[int, ...]:
    window = source.integer("sliding_window", 0, MAX_CONTEXT, 0 if "sliding_window" in source.raw
                            else 4096)  # fmt: skip
    if source.get("layer_types") is not None:
        return typed_windows(source, n_layers, window, notes)
    every = _EVERY[model_type]
    if model_type == "gemma3_text":
        every = source.integer("sliding_window_pattern", 1, MAX_LAYERS, every)
    return tuple(window if (i + 1) % every else 0 for i in range(n_layers))
