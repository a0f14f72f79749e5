"""The granite family's config and roles: Granite 3 and 4's dense models (arXiv 2405.04324).

Llama's layers and tensors; four constants take the place of widths: of the embedding, of attention
scores, of what a sublayer adds, and of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .fields import Fields
from .llama_config import LlamaConfig

_LEAST, _MOST = 1e-6, 1e6
# our field -> the checkpoints' key; 1 where config.json is silent
_FACTORS = {
    "embedding_factor": "embedding_multiplier",
    "attention_factor": "attention_multiplier",
    "residual_factor": "residual_multiplier",
    "logit_divisor": "logits_scaling",
}


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(LlamaConfig):
    """`attention_factor` is all that scores are multiplied by, the head's width included."""

    family: ClassVar[str] = "granite"
    model_types: ClassVar[tuple[str, ...]] = ("granite",)

    embedding_factor: float
    attention_factor: float
    residual_factor: float
    logit_divisor: float

    @classmethod
    def values_from_hf(cls, source: Fields, notes: list[str]) -> dict[str, Any]:
        values = super().values_from_hf(source, notes)
        factors = {
            ours: source.number(theirs, _LEAST, _MOST, 1.0) for ours, theirs in _FACTORS.items()
        }
        return values | factors

    @classmethod
    def values_from_dict(cls, source: Fields) -> dict[str, Any]:
        factors = {ours: source.number(ours, _LEAST, _MOST) for ours in _FACTORS}
        return super().values_from_dict(source) | factors
