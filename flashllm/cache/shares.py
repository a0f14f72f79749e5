"""How much each of several gets of what does not do for all."""

from __future__ import annotations

from collections.abc import Sequence


def shared_out(amount: float, weights: Sequence[float], most: Sequence[float]) -> list[float]:
    """`amount` shared out by weights, none getting more than its `most`: what one cannot take goes
    to the others; what no weight asks for goes to all by `most`."""
    given = [0.0] * len(most)
    for by in (weights, most):
        open_ = [i for i, n in enumerate(most) if by[i] > 0 and given[i] < n]
        left = amount - sum(given)
        while open_ and left > 1e-9 * amount:
            total = sum(by[i] for i in open_)
            for i in open_:
                given[i] = min(most[i], given[i] + left * by[i] / total)
            left = amount - sum(given)
            open_ = [i for i in open_ if given[i] < most[i]]
    return given
