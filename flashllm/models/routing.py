"""Which experts a token goes to, and with what weights: a pure function of its router scores.

Softmax over the experts, then the top k; a tie goes to the lowest id.  One token's result depends
on its own scores alone, bit for bit: exponentials are libm's in float64, their sum is exact
(`fsum`), and only the quotient is rounded to float32.
"""

from __future__ import annotations

import math

import numpy as np


def route(
    scores: np.ndarray, n_chosen: int, *, normalise: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [T, n_chosen] ascending expert ids, their float32 weights) of scores [T, n_experts].

    `normalise`: the chosen weights sum to 1; otherwise they are shares of all experts' softmax.
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :n_chosen]
    chosen = np.sort(best, axis=1).astype(np.int32)
    weights = np.empty(chosen.shape, np.float32)
    for t, row in enumerate(scores.tolist()):
        top = max(row)
        shares = [math.exp(score - top) for score in row]
        mine = [shares[e] for e in chosen[t].tolist()]
        total = math.fsum(mine if normalise else shares)
        weights[t] = [share / total for share in mine]
    return chosen, weights


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """float32 [T] of scores [T], each by libm's exp."""
    small = [math.exp(-abs(score)) for score in scores.tolist()]
    return np.array(
        [(1.0 if s >= 0 else e) / (1.0 + e) for s, e in zip(scores.tolist(), small, strict=True)],
        np.float32,
    )
