"""The window: what the last k tokens used, the next one will use again ("LLM in a flash")."""

from __future__ import annotations

import numpy as np

from ..errors import UsageError
from .base import Predictor


class WindowPredictor(Predictor):
    """The union of the last `k` observed sets; empty at the start of a sequence."""

    name = "window"

    def __init__(self, n_bundles: int, *, k: int = 5):
        super().__init__(n_bundles)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise UsageError(f"a window is one token or more, not {k!r}")
        self.k = k
        # The token at which a bundle was last used, counted from 1; 0 never.  It wraps after 2^31
        # tokens of one sequence, which no context holds.
        self._last_use = np.zeros(n_bundles, np.int32)
        self._recent = np.empty(n_bundles, bool)
        self._ids = np.empty(n_bundles, np.int32)
        self._n_tokens = 0
        self.resident_bytes = self._last_use.nbytes + self._recent.nbytes + self._ids.nbytes

    def predict(self, x: np.ndarray) -> np.ndarray:
        np.greater(self._last_use, max(0, self._n_tokens - self.k), out=self._recent)
        found = np.flatnonzero(self._recent)
        ids = self._ids[: found.size]
        ids[:] = found
        return ids

    def observe(self, ids: np.ndarray) -> None:
        self._n_tokens += 1
        self._last_use[self.check_ids(ids)] = self._n_tokens

    def reset(self) -> None:
        self._n_tokens = 0
        self._last_use.fill(0)
