"""Prefill and decode over one model and one sequence state; a step may also be over others'.

The engine decides what a step is and tells the store the order of planes ahead; what those planes
are, where they lie and how a sequence remembers is not its business.  Results do not depend on
how a prompt is cut into chunks (docs/ARITHMETIC.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from ..errors import ContextLengthError, UsageError
from ..models.state import SequenceState, StateGroup
from .drafts import NO_DRAFTS, Drafts
from .room import Room
from .snapshot import Snapshot
from .totals import Totals


class Engine:
    """Runs a model token by token or chunk by chunk; one sequence at a time, or a group's
    (group.py) step by step.

    `drafts` is what may be guessed (speculation.py).  `check` (debug) is called after every step.
    """

    def __init__(
        self, model, store, state, *, drafts: Drafts = NO_DRAFTS,
        check: Callable[[], None] | None = None,
    ):  # fmt: skip
        self.model, self.store, self.state = model, store, state
        self.check = check
        self.room = Room(state, model.scratch)
        self.drafts = replace(drafts, most=min(drafts.most, self.chunk - 1))
        self.rows = np.zeros((1 + self.drafts.most, model.config.vocab_size), np.float32)
        self._logits = self.rows[:1]
        state.make_marks(self.drafts.most)
        self.pending: tuple[int, ...] = ()  # said in this sequence, and not taken in
        self.orders = {head: model.order(with_head=head) for head in (False, True)}

    @property
    def chunk(self) -> int:
        """The most prompt tokens that share a pass over the weights."""
        return self.model.max_tokens

    def reset(
        self, snapshot: Snapshot | None = None, state: SequenceState | None = None
    ) -> None:
        """Begin anew, or where `snapshot` was taken; the caller feeds its pending tokens.  Of
        another `state` than the engine's own only that is touched."""
        if state is None or state is self.state:
            state, self.pending = self.state, ()
            if self.model.approximation is not None:
                self.model.approximation.reset()
        state.reset()
        if snapshot is not None:
            if state is self.state:
                self.room.at_least(snapshot.length, 1)
            state.restore(snapshot.length, snapshot.arrays)

    def snapshot(self, model: str) -> Snapshot:
        """A copy of the sequence as it stands, which belongs to the container `model`."""
        views = self.state.holding(self.state.length)
        arrays = {name: view.copy() for name, view in views.items()}
        return Snapshot(model, self.state.length, self.pending, arrays)

    def check_ids(self, ids: np.ndarray, *, taken: int = 0) -> np.ndarray:
        """int32 ids that this model and context can take after `taken` tokens, or an error naming
        both numbers."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise UsageError(f"token ids must be a flat list of integers, not {ids.dtype} "
                             f"of shape {ids.shape}")
        if ids.size == 0:
            raise UsageError("the prompt has no tokens")
        vocab = self.model.config.vocab_size
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab:
            raise UsageError(f"token id {low if low < 0 else high} is outside 0..{vocab - 1}")
        room = self.state.capacity - taken
        if ids.size > room:
            raise ContextLengthError(ids.size, room)
        return np.ascontiguousarray(ids, dtype=np.int32)

    def prefill(
        self,
        ids: np.ndarray,
        totals: Totals,
        *,
        all_logits: np.ndarray | None = None,
        progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> np.ndarray | None:
        """Take int32 `ids` in; float32 logits [vocab_size] after the last, None if cancelled.

        With `all_logits` float32 [n, vocab_size], row i receives the logits after ids[: i + 1].
        The returned row is valid until the next step.
        """
        n = ids.size
        self.room.exactly(self.state.length + n, min(n, self.chunk))
        for first in range(0, n, self.chunk):
            if cancelled():
                return None
            part = ids[first : first + self.chunk]
            stop = first + part.size
            wants_head = stop == n or all_logits is not None
            next_wants_head = stop == n or stop + self.chunk >= n or all_logits is not None
            out = None
            if all_logits is not None:
                out = all_logits[first:stop]
            elif wants_head:
                out = self._logits
            self.step(part, out, totals, head=wants_head, next_head=next_wants_head)
            if progress is not None:
                progress(stop, n)
        return self._logits[0] if all_logits is None else all_logits[n - 1]

    def decode(self, token: int, totals: Totals) -> np.ndarray:
        """One step; float32 logits [vocab_size], valid until the next step."""
        ids = np.array([token], dtype=np.int32)
        self.step(ids, self._logits, totals, decoding=True)
        return self._logits[0]

    def follow(self, ids: np.ndarray, totals: Totals, out: np.ndarray) -> None:
        """Take int32 `ids` in one by one as decoding does, the first of a sequence as a prompt;
        row i of float32 out [n, vocab_size] receives the logits after ids[: i + 1]."""
        for i, token in enumerate(ids):
            first = self.state.length == 0
            logits = self.prefill(ids[:1], totals) if first else self.decode(int(token), totals)
            out[i] = logits

    def step(
        self, ids: np.ndarray, out: np.ndarray | None, totals: Totals, *,
        state: SequenceState | StateGroup | None = None, rows: np.ndarray | None = None,
        head: bool = True, next_head: bool = True, decoding: bool = False,
    ) -> None:  # fmt: skip
        """One pass of int32 `ids` into `state` (the engine's own): DecoderModel.forward.

        `head` and `next_head`: whether this pass and the one after it go on to the logits.  The
        cache learns from what is `decoding`.
        """
        state = self.state if state is None else state
        self._make_room(state, ids.size, decoding)
        share = totals.decode if decoding else totals.prompt
        clock, started = self.model.clock, time.perf_counter_ns()
        before = clock.spent()
        orders = self.orders
        self.store.begin_step(orders[head], admit=decoding, next_order=orders[next_head])
        try:
            self.model.forward(ids, state, out, rows=rows, decoding=decoding)
        finally:
            stats = self.store.end_step()
            share.add(
                stats, tokens=ids.size, wall_ns=time.perf_counter_ns() - started,
                length=sum(one.length for _, one in state.spans(ids.size)),
                phases=self.model.phases, before=before, after=clock.spent(),
            )  # fmt: skip
        share.add_counts(self.model.counts)
        totals.predicted.add(self.model.counts.predicted)
        if self.check is not None:
            self.check()

    def _make_room(self, state: SequenceState | StateGroup, n_tokens: int, decoding: bool) -> None:
        length = self.state.length
        for rows, one in state.spans(n_tokens):
            if one is self.state:
                length += rows.stop - rows.start
        if decoding:
            self.room.decoding(length, max(n_tokens, len(self.rows)))
        else:
            self.room.at_least(length, n_tokens)

    def tokens(
        self,
        ids: np.ndarray,
        choose: Callable[[np.ndarray], int],
        totals: Totals,
        *,
        max_tokens: int,
        after: Callable[[int, int], np.ndarray],
        progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[int]:
        """Yield up to `max_tokens` ids; the caller stops early by closing the iterator.

        `after(token, n)` decodes: logits after `token`, n tokens at most being asked for after the
        one that they are for.
        """
        logits = self.prefill(ids, totals, progress=progress, cancelled=cancelled)
        for n_done in range(1, max_tokens + 1):
            if logits is None or cancelled():
                return
            token = choose(logits)
            yield token
            if n_done < max_tokens and not cancelled():
                logits = after(token, max_tokens - n_done - 1)
