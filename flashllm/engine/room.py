"""What a sequence has of the memory that is meant for the longest; the rest is lent to weights.

The plan has room for a whole context and for passes over whole chunks of prompts.  A sequence of
200 tokens that decodes uses little of it, and what it does not use keeps weights that would stream
for every token.  It comes back before it is written to, some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..units import align_up

# Positions.  A change costs about what is on its way in the ring, 20 ms of some 64 times 100.
STEP = 64


class Room:
    """Of one engine's state and scratch: memory for the first `n_positions` of a sequence and for
    passes of `n_tokens`.  All of it, until `lend` is called."""

    def __init__(self, state: Any, scratch: Any):
        self._state, self._scratch = state, scratch
        self.n_positions, self.n_tokens = state.capacity, scratch.max_tokens
        self._held = self.n_positions, self.n_tokens
        self._follow: Callable[[], Callable[[], None]] | None = None

    def lend(self, follow: Callable[[], Callable[[], None]]) -> None:
        """From now on what is not used is lent, at first all but a chunk of a prompt.  `follow`, a
        weak reference, is what makes weights fit beside what is held, as `spare` says."""
        self.n_positions = self._positions(self.n_tokens)
        self._hold(self.n_positions, self.n_tokens)
        self._follow = follow

    def spare(self) -> dict[str, int]:
        """Lines of the plan and how much of them is lent."""
        if self._follow is None:
            return {}
        return {"state": self._state.spare_bytes(self.n_positions),
                "scratch": self._scratch.spare_bytes(self.n_tokens)}  # fmt: skip

    def exactly(self, n_positions: int, n_tokens: int) -> None:
        """Passes of so many tokens are to come, after which a sequence has so many positions."""
        wanted = self._positions(n_positions), self._tokens(n_tokens)
        if self._follow is not None and wanted != self._held:
            self._change(*wanted)

    def at_least(self, n_positions: int, n_tokens: int) -> None:
        """As `exactly`, and nothing is lent that was not."""
        self.exactly(max(n_positions, self._held[0]), max(n_tokens, self._held[1]))

    def decoding(self, n_positions: int, n_tokens: int) -> None:
        """As `exactly`, of positions at least those that are held."""
        self.exactly(max(n_positions, self._held[0]), n_tokens)

    def _change(self, n_positions: int, n_tokens: int) -> None:
        """First what is given up, then weights, then what is taken: never more than planned.
        What fails in between is done again before the next pass."""
        self._hold(min(n_positions, self._held[0]), min(n_tokens, self._held[1]))
        self.n_positions, self.n_tokens = n_positions, n_tokens
        self._follow()()
        self._hold(n_positions, n_tokens)

    def _hold(self, n_positions: int, n_tokens: int) -> None:
        self._state.hold(n_positions)
        self._scratch.hold(n_tokens)
        self._held = n_positions, n_tokens

    def _positions(self, n: int) -> int:
        return min(align_up(n, STEP), self._state.capacity)

    def _tokens(self, n: int) -> int:
        """A power of two: sequences of a group that end one by one are not as many changes."""
        return min(1 << (n - 1).bit_length(), self._scratch.max_tokens)
