"""The two ends between which every predictor lies: one that knows, one that takes all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .base import Predictor


class OraclePredictor(Predictor):
    """Is told the truth: `truth(x)` gives the ids that x really uses.  What perfect would be."""

    name = "oracle"
    resident_bytes = 0

    def __init__(self, n_bundles: int, *, truth: Callable[[np.ndarray], np.ndarray]):
        super().__init__(n_bundles)
        self._truth = truth

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.check_ids(self._truth(x))


class DensePredictor(Predictor):
    """Every bundle, always: recall 1 and the precision of the layer's own density."""

    name = "dense"

    def __init__(self, n_bundles: int):
        super().__init__(n_bundles)
        self._ids = np.arange(n_bundles, dtype=np.int32)
        self._ids.flags.writeable = False
        self.resident_bytes = self._ids.nbytes

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self._ids
