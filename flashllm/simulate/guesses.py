"""What a predictor would have asked for ahead, by a trace alone.

    none          nothing: what is active is read when it is known (exact mode as it is)
    oracle        what is active, no more
    dense         everything
    window:K      what the last K tokens of the same context used (predictors/window.py)
    noisy:R:P     recall R and precision P, as `fit` reports them of a fitted predictor: every
                  active bundle with chance R, and inactive ones evenly at random

A trace holds no inputs, so a fitted predictor is imitated by its two numbers; what it gets wrong
lies in clusters and these do not, which flatters no one order more than another.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import UsageError
from ..predictors.window import WindowPredictor
from ..tracing.base import MAX_TOKENS

NONE = "none"
Sets = tuple[np.ndarray, np.ndarray]  # first, ids as Trace.active gives them


def guesses(name: str, first: np.ndarray, ids: np.ndarray, *, n_bundles: int, starts: np.ndarray,
            seed: int = 0) -> Sets | None:  # fmt: skip
    """(first, ids) asked for ahead by every token; None: there is no predictor.

    UsageError for another name, or for options that cannot be.
    """
    make = _maker(name)
    if make is None:
        return None
    sets = np.split(ids, first[1:-1])
    found = make(sets, n_bundles, {int(s) for s in starts}, np.random.default_rng(seed))
    counts = np.array([len(one) for one in found], np.int64)
    return np.concatenate(([0], np.cumsum(counts))), np.concatenate(found)


def check_guesses(name: str) -> None:
    """UsageError unless `guesses` knows it."""
    _maker(name)


def _maker(name: str) -> Callable | None:
    kind, *options = name.split(":")
    try:
        values = [float(option) for option in options]
        if kind == NONE and not values:
            return None
        if kind == "oracle" and not values:
            return lambda sets, *_: sets
        if kind == "dense" and not values:
            return lambda sets, n, *_: [np.arange(n, dtype=np.int32)] * len(sets)
        if kind == "window" and len(values) == 1 and 1 <= int(options[0]) <= MAX_TOKENS:
            k = int(options[0])
            return lambda sets, n, starts, _: _window(sets, n, starts, k)
        if kind == "noisy" and len(values) == 2 and all(0 < value <= 1 for value in values):
            return lambda sets, n, _, rng: [_noisy(one, n, *values, rng) for one in sets]
    except ValueError:
        pass
    raise UsageError(
        f"predictor {name!r}: there are none, oracle, dense, window:TOKENS, noisy:RECALL:PRECISION"
    )


def _window(sets: list[np.ndarray], n_bundles: int, starts: set[int], k: int) -> list[np.ndarray]:
    predictor, nothing, found = WindowPredictor(n_bundles, k=k), np.zeros(0, np.float32), []
    for token, used in enumerate(sets):
        if token in starts:
            predictor.reset()
        found.append(predictor.predict(nothing).copy())
        predictor.observe(used)
    return found


def _noisy(
    used: np.ndarray, n_bundles: int, recall: float, precision: float, rng: np.random.Generator
) -> np.ndarray:
    hit = used[rng.random(len(used)) < recall]
    others = np.setdiff1d(np.arange(n_bundles, dtype=np.int32), used, assume_unique=True)
    # On average, so that a set of one is not always alone.
    n_false = min(int(len(hit) * (1 / precision - 1) + rng.random()), len(others))
    return np.sort(np.concatenate([hit, rng.choice(others, n_false, replace=False)]))
