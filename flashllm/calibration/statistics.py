"""What fitting needs to know of each sparse layer, gathered while an exact engine reads a text.

Per layer: how often each neuron was active, and samples of the inputs x, for tokens in three roles,
by the window they lie in, so that thresholds are not set on what weights were fitted to, nor
measured on what they were set on:
- the last 15 % of the text MEASURE;
- before them every fourth window sets THRESHOLDS;
- the others are FITTED to: their covariance, and what the layer decides about them.
Samples are every k-th token of a role.  All of them wait on disk, so that one pass over the text
serves every layer whatever the budget; in memory are the counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .spool import Spool

FITTED, THRESHOLDS, MEASURE = ROLES = range(3)
# A layer has many neurons, so few tokens show many active ones.
SAMPLES = {THRESHOLDS: 1536, MEASURE: 1024}
MEASURED_SHARE = 0.15
# Inputs for a covariance: several to each of its directions.
LEAST_INPUTS, INPUTS_PER_COLUMN = 4096, 4
BLOCK = 256  # rows of the products, and tokens, at once


def sample_tokens(role: int, hidden_size: int) -> int:
    """The most tokens of a role that are kept."""
    return SAMPLES.get(role) or max(LEAST_INPUTS, INPUTS_PER_COLUMN * hidden_size)


def decided_tokens(n_bundles: int) -> int:
    """Of those fitted to, the most that the deciding matrix is multiplied with; fewer where layers
    are large, for these products take much of the time and a large layer has more neurons to learn
    from."""
    return max(1024, min(4096, 2**22 // n_bundles))


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
    """Up to `size` tokens of a layer on disk: x as float16, and with `n_bundles` the truth as
    bits."""

    def __init__(self, spool: Spool, size: int, hidden_size: int, n_bundles: int = 0):
        self._spool, self._hidden, self.n_bundles, self.n = spool, hidden_size, n_bundles, 0
        self._row_bits = -(-n_bundles // 8)
        self._x_at = spool.reserve(size * 2 * hidden_size)
        self._bits_at = spool.reserve(size * self._row_bits)

    def add(self, x: np.ndarray, active: np.ndarray) -> None:
        if not len(x):
            return
        self._spool.write(self._x_at + self.n * 2 * self._hidden, x.astype(np.float16))
        if self.n_bundles:
            bits = np.packbits(active, axis=1, bitorder="little")
            self._spool.write(self._bits_at + self.n * self._row_bits, bits)
        self.n += len(x)

    def x(self, first: int = 0, stop: int | None = None) -> np.ndarray:
        """float32 [tokens, hidden_size], for tokens first .. stop - 1 at most."""
        stop = self.n if stop is None else min(stop, self.n)
        raw = np.empty((max(0, stop - first), self._hidden), np.float16)
        return self._spool.read(self._x_at + first * 2 * self._hidden, raw).astype(np.float32)

    def some(self, most: int) -> np.ndarray:
        """float32 [tokens, hidden_size] of at most so many tokens, evenly from all."""
        picked = np.linspace(0, self.n - 1, min(most, self.n)).astype(np.int64)
        out = np.empty((len(picked), self._hidden), np.float32)
        for first in range(0, self.n, BLOCK):
            here = (picked >= first) & (picked < first + BLOCK)
            out[here] = self.x(first, first + BLOCK)[picked[here] - first]
        return out

    def active(self, first: int = 0, stop: int | None = None) -> np.ndarray:
        """int8 [tokens, n_bundles]: 1 where active, for tokens first .. stop - 1 at most."""
        stop = self.n if stop is None else min(stop, self.n)
        raw = np.empty((max(0, stop - first), self._row_bits), np.uint8)
        self._spool.read(self._bits_at + first * self._row_bits, raw)
        bits = np.unpackbits(raw, axis=1, bitorder="little", count=self.n_bundles)
        return bits.view(np.int8)


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

    def __init__(self, spool: Spool, hidden_size: int, n_bundles: int, tokens: dict[int, int]):
        self.n, self._hidden, self._spool = 0, hidden_size, spool
        self._kept: tuple[int, tuple[int, ...], np.dtype] | None = None
        self.counts = np.zeros(n_bundles, np.int64)
        most = {role: sample_tokens(role, hidden_size) for role in tokens}
        self.samples = {
            role: Sample(spool, min(most[role], n), hidden_size, n_bundles if role else 0)
            for role, n in tokens.items()
        }
        self._turns = {role: _Turn(max(1, -(-n // most[role]))) for role, n in tokens.items()}

    @staticmethod
    def n_bytes(n_bundles: int) -> int:
        """What one of these keeps in memory."""
        return 8 * n_bundles

    def add(self, role: int, x: np.ndarray, decided: np.ndarray) -> None:
        """The next tokens: inputs [T, hidden_size] and deciding pre-activations [T, n_bundles]."""
        active = decided > 0
        if role == FITTED:
            self.n += len(x)
            self.counts += np.count_nonzero(active, axis=0)
        picked = self._turns[role].pick(len(x))
        self.samples[role].add(x[picked], active[picked])

    def inputs(self) -> np.ndarray:
        """float32 [tokens, hidden_size]: what the deciding matrix is multiplied with."""
        return self.samples[FITTED].some(decided_tokens(len(self.counts)))

    def covariance(self) -> np.ndarray:
        """float32 [hidden_size, hidden_size] of the inputs fitted to."""
        found, mean = np.zeros((self._hidden, self._hidden), np.float32), np.zeros(self._hidden)
        sample = self.samples[FITTED]
        for at in range(0, sample.n, 4 * BLOCK):
            x = sample.x(at, at + 4 * BLOCK)
            mean += x.sum(axis=0, dtype=np.float64) / sample.n
            for first in range(0, self._hidden, BLOCK):
                found[first : first + BLOCK] += x[:, first : first + BLOCK].T @ x
        found /= sample.n
        for first in range(0, self._hidden, BLOCK):
            found[first : first + BLOCK] -= np.outer(mean[first : first + BLOCK], mean)
        return found

    def keep(self, found: np.ndarray) -> None:
        """What surveying a layer found and building it needs again waits on disk too."""
        self._kept = (self._spool.reserve(found.nbytes), found.shape, found.dtype)
        self._spool.write(self._kept[0], found)

    def kept(self) -> np.ndarray:
        at, shape, dtype = self._kept
        return self._spool.read(at, np.empty(shape, dtype))

    def used(self) -> float:
        """Active bundles per token."""
        return float(self.counts.sum()) / max(1, self.n)
