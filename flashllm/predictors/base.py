"""The contract of a predictor: which bundles of a layer will a token use?

    x float32[hidden_size]  ->  ids int32[k], ascending, distinct, each in 0..n_bundles - 1

`x` is the normed input of the layer's FFN (what the observer of models/ffn.py sees), ids are
the layer's bundles in the container's order.  A predictor refuses to know what is cached, what a
read costs and whether its answer decides the result (approximate mode) or only what is fetched
early.

What stays true:
- `predict` changes nothing: the same x after the same `observe` calls gives the same ids, whatever
  the thread count.  Its ids are a view that holds until the next `predict`.
- `observe(ids)` says what the token that was predicted last truly used (or was computed with, where
  nobody knows the truth), once per token and in order; kinds without a memory ignore it.  `reset`
  forgets: a new sequence begins.
- `resident_bytes` is everything it keeps in memory, weights and scratch, from the moment it is
  made; it does not grow afterwards, so that the ledger can charge it before.
- One predictor serves one sequence at a time, from one thread.

Predictors that were fitted to a container come from a `.fit` file (FIT.md): `open_fit(path)` in
fit.py believes nothing, reads the header only and says what loading would take:

    fit = open_fit(path)               # FormatError, UnsupportedError, FlashReadError
    fit.require(container.digest)      # FitMismatchError, which names both digests
    fit.require_shape(hidden_size, {layer: n_bundles})  # FormatError: a file may claim any digest
    fit.resident_bytes                 # of all layers together, for the ledger
    fit.recalls                        # ascending, such as (0.9, 0.95, 0.99, 0.995)
    fit.load(kernels, recall)          # {layer: Predictor}; the least fitted recall >= `recall`
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from ..errors import UsageError
from ..kernels.base import check_array


class Predictor(ABC):
    """One layer's predictor; see the module's text."""

    name: str
    n_bundles: int
    resident_bytes: int
    remembers: ClassVar[bool] = False  # whether `observe` does anything

    def __init_subclass__(cls) -> None:
        cls.remembers = cls.observe is not Predictor.observe

    def __init__(self, n_bundles: int):
        if isinstance(n_bundles, bool) or not isinstance(n_bundles, int) or n_bundles < 1:
            raise UsageError(f"a layer has at least one bundle, not {n_bundles!r}")
        self.n_bundles = n_bundles

    @abstractmethod
    def predict(self, x: np.ndarray) -> np.ndarray:
        """int32 ids of the bundles that float32 x [hidden_size] is believed to need."""

    def observe(self, ids: np.ndarray) -> None:  # noqa: B027 (most kinds have no memory)
        """Ids that the token predicted last has used."""

    def reset(self) -> None:  # noqa: B027
        """Forget the sequence."""

    def check_ids(self, ids: np.ndarray) -> np.ndarray:
        """`ids` if they are what `predict` may return, else UsageError."""
        check_array("ids", ids, np.int32, (None,))
        if ids.size and (ids[0] < 0 or ids[-1] >= self.n_bundles or (np.diff(ids) <= 0).any()):
            raise UsageError(f"ids must ascend strictly within 0..{self.n_bundles - 1}")
        return ids
