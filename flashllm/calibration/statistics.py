"""What fitting needs to know of each sparse layer, gathered while an exact engine reads a text.

Per layer: count, sum and products of the inputs x (their mean and covariance), how often each
neuron was active, and samples of x with the truth beside them.  Tokens play one of three roles, by
the window they lie in, so that thresholds are not set on what weights were fitted to, nor measured
on what they were set on:
- the last 15 % of the text MEASURE;
- before them every fourth window sets THRESHOLDS;
- the others are FITTED to.
Samples are every k-th token of a role.  All memory is allocated, and touched, at the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FITTED, THRESHOLDS, MEASURE = ROLES = range(3)
SAMPLES = {THRESHOLDS: 4096, MEASURE: 2048}
MEASURED_SHARE = 0.15


def sample_tokens(role: int, n_bundles: int) -> int:
    """The most tokens that are sampled; fewer to fit to where layers are large, for the products
    with them take most of the time and a large layer has more neurons to learn from."""
    return SAMPLES.get(role) or max(1024, min(4096, 2**23 // n_bundles))


def roles_of(windows: list[np.ndarray]) -> list[int]:
    """The role of each window of token ids."""
    total, seen, roles = sum(len(ids) for ids in windows), 0, []
    for i, ids in enumerate(windows):
        if seen + len(ids) / 2 >= (1 - MEASURED_SHARE) * total:
            roles.append(MEASURE)
        else:
            roles.append(THRESHOLDS if i % 4 == 2 else FITTED)
        seen += len(ids)
    if len(windows) >= 3:  # a short text still serves all three
        roles[-1] = MEASURE
        roles[-2] = THRESHOLDS if THRESHOLDS not in roles[:-1] else roles[-2]
    return roles


class Sample:
    """Up to `size` tokens: x as float16, the truth as bits."""

    def __init__(self, size: int, hidden_size: int, n_bundles: int):
        self._x = np.zeros((size, hidden_size), np.float16)
        self._bits = np.zeros((size, -(-n_bundles // 8)), np.uint8)
        self.n_bundles, self.n = n_bundles, 0

    def add(self, x: np.ndarray, active: np.ndarray) -> None:
        stop = self.n + len(x)
        self._x[self.n : stop] = x
        self._bits[self.n : stop] = np.packbits(active, axis=1, bitorder="little")
        self.n = stop

    def x(self) -> np.ndarray:
        """float32 [n, hidden_size], a copy."""
        return self._x[: self.n].astype(np.float32)

    def active(self, first: int = 0, stop: int | None = None) -> np.ndarray:
        """bool [n, stop - first]: whether bundles first .. stop - 1 were active; first % 8 is 0."""
        stop = self.n_bundles if stop is None else stop
        raw = self._bits[: self.n, first // 8 : -(-stop // 8)]
        return np.unpackbits(raw, axis=1, bitorder="little")[:, : stop - first].astype(bool)

    def active_at(self, first: int, stop: int) -> np.ndarray:
        """int64 [tokens, n_bundles]: 1 where active, for tokens first .. stop - 1 at most."""
        raw = self._bits[first : min(stop, self.n)]
        bits = np.unpackbits(raw, axis=1, bitorder="little", count=self.n_bundles)
        return bits.astype(np.int64)


@dataclass
class _Turn:
    """Every `every`-th token of a role is sampled; `seen` so far."""

    every: int
    seen: int = 0

    def pick(self, n: int) -> slice:
        first = -self.seen % self.every
        self.seen += n
        return slice(first, n, self.every)


class LayerStatistics:
    """One layer's."""

    def __init__(self, hidden_size: int, n_bundles: int, tokens: dict[int, int]):
        self.n = 0
        self._sum = np.zeros(hidden_size, np.float64)
        self._products = np.zeros((hidden_size, hidden_size), np.float32)
        self.counts = np.zeros(n_bundles, np.int64)
        most = {role: sample_tokens(role, n_bundles) for role in tokens}
        self.samples = {
            role: Sample(min(most[role], n), hidden_size, n_bundles) for role, n in tokens.items()
        }
        self._turns = {role: _Turn(max(1, -(-n // most[role]))) for role, n in tokens.items()}

    @staticmethod
    def n_bytes(hidden_size: int, n_bundles: int, tokens: dict[int, int]) -> int:
        """What one of these holds."""
        per_token = 2 * hidden_size + -(-n_bundles // 8)
        samples = sum(min(sample_tokens(role, n_bundles), n) for role, n in tokens.items())
        return 4 * hidden_size**2 + 8 * (hidden_size + n_bundles) + samples * per_token

    def add(self, role: int, x: np.ndarray, decided: np.ndarray) -> None:
        """The next tokens: inputs [T, hidden_size] and deciding pre-activations [T, n_bundles]."""
        active = decided > 0
        if role == FITTED:
            self.n += len(x)
            self._sum += x.sum(axis=0, dtype=np.float64)
            self._products += x.T @ x
            self.counts += np.count_nonzero(active, axis=0)
        picked = self._turns[role].pick(len(x))
        self.samples[role].add(x[picked], active[picked])

    def mean(self) -> np.ndarray:
        """float64 [hidden_size]."""
        return self._sum / self.n

    def covariance(self) -> np.ndarray:
        """float64 [hidden_size, hidden_size]."""
        mean = self.mean()
        return self._products.astype(np.float64) / self.n - np.outer(mean, mean)
