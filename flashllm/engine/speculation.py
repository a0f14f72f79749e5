"""Several tokens from one pass over the weights: a draft is taken in behind the newest token, and
as much of it is kept as turns out to be what would have been chosen anyway.

`after(token)` gives the logits that decoding would give after it, whatever was drafted: rows of one
pass have the bits of single tokens (docs/ARITHMETIC.md), and the caller draws from each row only
when it has got there, so its random numbers are used as without a draft.  What was taken in and not
said is rewound.
"""

from __future__ import annotations

import time

import numpy as np

from .drafts import Pace
from .engine import Engine
from .lookup import Lookup
from .totals import Totals


class Speculation:
    """Of one request on the engine's own state.  `settle` leaves the state as if nothing had ever
    been drafted.  Where the engine drafts nothing it decodes."""

    def __init__(self, engine: Engine, totals: Totals, ids: np.ndarray):
        self._engine, self._totals, self._rows = engine, totals, engine.rows
        self.pace = Pace(len(engine.rows) - 1, engine.drafts.always)
        room = engine.state.capacity - engine.state.length
        self._lookup = Lookup(ids, ids.size + room)
        self._draft: list[int] = []  # in the state behind the token it follows
        self._n_right = 0  # of it, so far
        self._base, self._ns = 0, 0  # the state's length before that pass, and how long it took

    def after(self, token: int, n_more: int) -> np.ndarray:
        """float32 logits [vocab_size] after `token`, valid until the next call; `n_more` tokens may
        still be asked for after the one they are for."""
        if not self.pace.most:
            return self._engine.decode(token, self._totals)
        self._lookup.push(token)
        if self._n_right < len(self._draft) and self._draft[self._n_right] == token:
            self._n_right += 1
            return self._rows[self._n_right]
        self.settle()
        state = self._engine.state
        n = min(self.pace.wanted(), n_more, state.capacity - state.length - 1)
        draft = self._lookup.draft(n) if n > 0 else []
        started = time.perf_counter_ns()
        if not draft:
            logits = self._engine.decode(token, self._totals)
            self.pace.plain(time.perf_counter_ns() - started)
            return logits
        ids = np.array([token, *draft], np.int32)
        self._base = state.length
        state.mark(ids.size)
        self._engine.step(ids, self._rows[: ids.size], self._totals, decoding=True)
        self._ns, self._draft = time.perf_counter_ns() - started, draft
        self._totals.drafted += len(draft)
        return self._rows[0]

    def settle(self) -> None:
        """Take back what was drafted and not said."""
        if not self._draft:
            return
        n_draft, n_right = len(self._draft), self._n_right
        self._draft, self._n_right = [], 0
        self._engine.state.rewind(self._base + 1 + n_right)
        self._totals.accepted += n_right
        self.pace.verified(self._ns, drafted=n_draft, accepted=n_right)
