"""A draft without a model: what came next the last time the text went like this.

Prompt lookup decoding (Saxena, 2023; also called n-gram speculation): the newest tokens are looked
for earlier in the sequence, the longest match first, and what followed the latest one is proposed.
"""

from __future__ import annotations

import numpy as np

LONGEST, SHORTEST = 4, 2  # tokens of a match; single tokens matched by chance more often than not


class Lookup:
    """The tokens of one sequence so far, prompt included, in room for `capacity`."""

    def __init__(self, ids: np.ndarray, capacity: int):
        self._ids = np.empty(max(capacity, ids.size), np.int32)
        self._ids[: ids.size] = ids
        self._n = ids.size

    def push(self, token: int) -> None:
        self._ids[self._n] = token
        self._n += 1

    def draft(self, n: int) -> list[int]:
        """Up to `n` tokens that may come next; none where nothing like the end was seen before."""
        ids = self._ids[: self._n]
        for length in range(min(LONGEST, ids.size - 1), SHORTEST - 1, -1):
            same = ids[length - 1 : -1] == ids[-1]
            for back in range(1, length):
                same &= ids[length - 1 - back : -1 - back] == ids[-1 - back]
            ends = np.flatnonzero(same)
            if ends.size:
                start = int(ends[-1]) + length
                # Where the match overlaps the end, what is drafted goes on repeating itself.
                period = ids.size - start
                return [int(ids[start + k % period]) for k in range(n)]
        return []
