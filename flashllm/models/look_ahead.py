"""Look-ahead: which experts the next layer will ask for, guessed by its own router one layer early.

What a layer adds to the residual is small beside it, so the next layer's router often names its
experts from this layer's input already.  Their reads then fill the time in which the device would
stand still: between this layer's last read and the next layer's first, attention is computed and
reads are planned.  That time is short, so only the likeliest of the guessed experts that are absent
are read early.  Advice only: a wrong guess costs a read and never a token.  Whether guesses come
true is counted, and a layer whose guesses do not is no longer advised.
"""

from __future__ import annotations

import numpy as np

WORTH = 0.6  # share of guesses that must come true: below it a busy device loses by them
N_MEAN = 16  # guesses over which that share is a mean, in the main


class LookAhead:
    """Guesses of one model by layer, `most` experts at a time, and how often they came true."""

    def __init__(self, n_layers: int, most: int):
        self.most = most
        self.right = np.full(n_layers, WORTH)
        self._guessed: dict[int, np.ndarray] = {}

    def guess(self, layer: int, experts: np.ndarray) -> bool:
        """`layer` is expected to ask for `experts`; whether they are worth reading early."""
        self._guessed[layer] = experts
        return len(experts) > 0 and self.right[layer] >= WORTH

    def came(self, layer: int, experts: np.ndarray) -> None:
        """These are what it does ask for."""
        guessed = self._guessed.pop(layer, ())
        if len(guessed):
            share = np.isin(guessed, experts).mean()
            self.right[layer] += (share - self.right[layer]) / N_MEAN
