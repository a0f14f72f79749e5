"""The nemotron family's config and roles: Nemotron-4 and Minitron (arXiv 2402.16819, 2407.14679).

Llama's layers with two differences: LayerNorms with a bias, whose weight is stored less one, and an
ungated squared-ReLU FFN, which is naturally sparse.  Half of each head turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .base import Roles, TensorRole, VectorRole
from .fields import Fields
from .llama_config import LlamaConfig, stem


@dataclass(frozen=True, kw_only=True)
class NemotronConfig(LlamaConfig):
    family: ClassVar[str] = "nemotron"
    model_types: ClassVar[tuple[str, ...]] = ("nemotron",)

    @classmethod
    def values_from_hf(cls, source: Fields, notes: list[str]) -> dict[str, Any]:
        values = super().values_from_hf(source, notes)
        return values | {"norm_eps": source.number("norm_eps", 0.0, 1.0, 1e-5)}

    def roles(self) -> Roles:
        roles = super().roles()
        norms = {"final_norm": "norm"}
        for i in range(self.n_layers):
            for ours, theirs in self.layer_norms.items():
                norms[f"layers.{i}.{ours}"] = f"layers.{i}.{theirs}"
        biases = tuple(
            VectorRole(f"{ours}.bias", (TensorRole(stem(f"{theirs}.bias"), (self.hidden_size,)),))
            for ours, theirs in norms.items()
        )
        return replace(roles, vectors=roles.vectors + biases)
