"""Nemotron-4 and Minitron: Llama's layers under LayerNorms whose weight is stored less one."""

from __future__ import annotations

import numpy as np

from .decoder import require_vector
from .llama import LlamaModel


class NemotronModel(LlamaModel):
    def __init__(self, config, planes, vectors, store, kernels, *, max_tokens, n_context, path=""):
        norms = [name.removesuffix(".bias") for name in vectors if name.endswith("norm.bias")]
        vectors = dict(vectors)
        for name in norms:
            require_vector(path, vectors, f"{name}.bias", config.hidden_size)
            weight = require_vector(path, vectors, f"{name}.weight", config.hidden_size)
            vectors[f"{name}.weight"] = weight + np.float32(1)
        super().__init__(
            config, planes, vectors, store, kernels,
            max_tokens=max_tokens, n_context=n_context, path=path,
        )  # fmt: skip

    def _norm(self, x: np.ndarray, name: str, out: np.ndarray) -> None:
        self.layer_norm(x, name, out)

    def _add_norm(self, x: np.ndarray, added: np.ndarray, name: str, out: np.ndarray) -> None:
        self.kernels.add(x, added)
        self.layer_norm(x, name, out)
