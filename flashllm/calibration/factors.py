"""The inputs' covariance, factored once for both kinds of predictor.

C = U U' with U upper triangular, columns of the input in descending order of their variance, and
the inverse of U beside it.  Rounding with feedback asks for the inverse (low_bit.py), the closed
form of a bottleneck for both (low_rank.py).  All of it happens in one float64 matrix, in place and
in blocks of columns: a factorisation that copies, as NumPy's do, takes four of them, and at half of
a small file's size there is no room for those.
"""

from __future__ import annotations

import numpy as np

from ..errors import UnsupportedError

BLOCK = 128
DAMPING = 1e-3  # of the mean variance, on the diagonal; up to 0.05 made no difference
# Covariances are summed in float32: of a wide input with few directions their rounding may exceed
# the damping, and a matrix that is no covariance any more needs so many times of it.
MORE = (1, 10, 100, 1000)


class InputFactors:
    """`order`: columns of the input, the most varying first; in that order `root` is U and
    `inverse` its inverse, float32 [hidden, hidden].  UnsupportedError where values are not finite.
    """

    def __init__(self, covariance: np.ndarray, *, damping: float = DAMPING):
        if not np.isfinite(covariance).all():
            raise UnsupportedError("a layer whose inputs are not finite cannot be fitted to")
        variance = np.diag(covariance).astype(np.float64)
        self.order = np.argsort(-variance, kind="stable")
        least = max(damping * variance.sum() / len(variance), 1e-30)
        for times in MORE:
            c = covariance[np.ix_(self.order, self.order)].astype(np.float64)
            c[np.diag_indices(len(c))] += times * least
            try:
                _factor(c)
                break
            except np.linalg.LinAlgError:
                del c  # before another one is made
        else:
            raise UnsupportedError(
                f"a layer whose inputs have no positive covariance, with {MORE[-1] * damping:g} of "
                "their mean variance added to it, cannot be fitted to"
            )
        self.root = c.astype(np.float32)
        _invert(c)
        self.inverse = c.astype(np.float32)

    @staticmethod
    def n_bytes(hidden_size: int) -> int:
        """The most that making one takes beside the covariance; 8 per entry stay."""
        return 16 * hidden_size**2 + 32 * BLOCK * hidden_size

    def ordered(self, rows: np.ndarray) -> np.ndarray:
        """Rows of a matrix with their columns in this order."""
        return np.ascontiguousarray(rows[:, self.order])


def _factor(c: np.ndarray) -> None:
    """Overwrite symmetric positive `c` with the upper triangular U of c = U U', from its end."""
    starts = range(0, len(c), BLOCK)
    for first in reversed(starts):
        stop = min(first + BLOCK, len(c))
        corner = c[first:stop, first:stop]
        flipped = np.linalg.cholesky(corner[::-1, ::-1])
        corner[:] = flipped[::-1, ::-1]
        panel = c[:first, first:stop]
        panel[:] = panel @ np.linalg.inv(corner).T
        c[stop:, first:stop] = 0.0
        for left in range(0, first, BLOCK):
            right = min(left + BLOCK, first)
            c[:right, left:right] -= panel[:right] @ panel[left:right].T


def _invert(u: np.ndarray) -> None:
    """Overwrite upper triangular `u` with its inverse, from its start."""
    for first in range(0, len(u), BLOCK):
        stop = min(first + BLOCK, len(u))
        corner = np.linalg.inv(u[first:stop, first:stop])
        u[:first, first:stop] = -(u[:first, :first] @ (u[:first, first:stop] @ corner))
        u[first:stop, first:stop] = np.triu(corner)
