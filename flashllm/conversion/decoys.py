"""Decoys: neurons that fire as real ones do and are wanted by nobody.

A decoy's deciding row is the mean of the rows of two source neurons, plus noise of an eighth of a
row's variance.  On the bundled model decoys are then active as often as its neurons (per layer 5.3
% against 4.7, 4.8 against 4.2, 5.6 against 5.2, 6.4 against 6.5; 1.3 against 0.2 in the layer that
is nearly silent), recur from token to token as they do, and share 17 to 30 % of their tokens with a
neuron that they are made of.  Half the variance makes them active twice as often, mostly the same
ones for every token.  Two decoys with the same row and opposite columns add nothing to the output,
which is how inflate.py uses them.

Pair 0 of a neuron is the neuron itself.  Rows are a pure function of the seed, the matrix, the
neuron and the pair.
"""

from __future__ import annotations

import numpy as np

NOISE = 1 / 8  # of a row's variance


class Decoys:
    """Of one model with `n_neurons` a layer."""

    def __init__(self, n_neurons: int, seed: int):
        self._n, self._seed = n_neurons, seed

    def rows(
        self, source: np.ndarray, neurons: np.ndarray, pairs: np.ndarray, stream: int
    ) -> np.ndarray:
        """float32 [k, n_cols]: the deciding row of each (neuron, pair).

        `source` [n_neurons, n_cols]: the small model's rows.  `stream` tells its matrices apart.
        """
        rows = source[neurons].astype(np.float32)
        for pair in np.unique(pairs[pairs > 0]).tolist():
            other, noise = self._of_pair(pair, stream, source.shape[1])
            here = np.flatnonzero(pairs == pair)
            mine = neurons[here]
            length = np.sqrt(np.mean(rows[here] ** 2, axis=1, keepdims=True) * NOISE)
            rows[here] = (rows[here] + source[other[mine]]) / 2 + length * noise[mine]
        return rows

    def _of_pair(self, pair: int, stream: int, n_cols: int) -> tuple[np.ndarray, np.ndarray]:
        """Every neuron's second source, and noise of deviation 1."""
        rng = np.random.default_rng([self._seed, 2, stream, pair])
        other = (np.arange(self._n) + rng.integers(1, max(2, self._n))) % self._n
        return rng.permutation(self._n)[other], rng.standard_normal((self._n, n_cols), np.float32)
