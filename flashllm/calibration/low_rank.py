"""The closed form of a low-rank predictor: reduced-rank regression of what a layer decides on its
input.

Of all B A of rank r, the one that is nearest to W in what it does to inputs with covariance C
minimises ||D (W - B A) C^(1/2)||: truncate the SVD of D W C^(1/2) and multiply by C^(-1/2)
(Izenman, 1975).  D weighs each neuron by the inverse of its own deviation, so that a quiet one
counts as much as a loud one.  The SVD comes from the Gram matrix [hidden, hidden], W being read by
blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

# Directions in which inputs vary less than this share of the most are no directions.
LEAST_VARIANCE = 1e-7

Blocks = Callable[[], Iterator[tuple[int, np.ndarray]]]  # (first row, float32 rows) of W, afresh


def reduced_rank(
    blocks: Blocks, n_rows: int, covariance: np.ndarray, rank: int, *, weighted: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """float32 A [r, hidden_size] and B [n_rows, r], r <= rank, best first: any leading part of both
    is the best of its rank."""
    variance, axes = np.linalg.eigh(covariance)
    real = variance > max(float(variance[-1]), 0.0) * LEAST_VARIANCE
    deviation = np.sqrt(variance[real])
    root = (axes[:, real] * deviation).astype(np.float32)
    gram = np.zeros((root.shape[1], root.shape[1]))
    weight = np.ones(n_rows, np.float32)
    for first, rows in blocks():
        seen = rows @ root
        if weighted:
            size = np.sqrt(np.square(seen, dtype=np.float64).sum(axis=1))
            weight[first : first + len(rows)] = 1 / np.maximum(size, 1e-30)
        seen *= weight[first : first + len(rows), None]
        gram += seen.T @ seen
    rank = min(rank, len(gram))
    _, directions = np.linalg.eigh(gram)
    best = directions[:, ::-1][:, :rank]
    a = (best.T @ (axes[:, real] / deviation).T).astype(np.float32)
    b, through = np.empty((n_rows, rank), np.float32), root @ best.astype(np.float32)
    for first, rows in blocks():
        b[first : first + len(rows)] = rows @ through
    return a, b
