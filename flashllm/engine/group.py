"""Several requests that share every pass over the weights.

A pass takes tokens of all sequences that still run, each sequence against its own state: what is
streamed is read once for all of them, sparse layers read the union of their active sets, and an
expert that any of them chose is read once.  The rows of a pass do not see each other, and sums have
their order whatever the other rows are (docs/ARITHMETIC.md): every sequence gets the tokens that it
would get alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..models.state import SequenceState, StateGroup
from .engine import Engine
from .request import Request
from .totals import Totals

# What a pass takes of one sequence: (its number, first and last id of its prompt, whether the
# prompt ends there).
Part = tuple[int, int, int, bool]


class Group:
    """Requests and a state for each; `run` yields after every pass, and then all have results.

    The counters of the results are the group's, all of them the same; tokens, text and times are
    each request's own.  At most `engine.chunk` requests.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[Request], states: Sequence[SequenceState], *,
        cancelled: Callable[[], bool], progress: Callable[[int, int], None] | None = None,
    ):  # fmt: skip
        self._engine, self._requests, self._states = engine, requests, states
        self._cancelled, self._progress = cancelled, progress
        self.totals = Totals()
        self._logits = np.zeros((len(requests), engine.model.config.vocab_size), np.float32)
        self._last: dict[int, int] = {}  # sequences that go on, and their newest token
        self._ended = [0.0] * len(requests)

    @staticmethod
    def logit_bytes(n: int, vocab_size: int) -> int:
        """What a group of `n` holds beside its states."""
        return 4 * n * vocab_size

    def run(self) -> Iterator[None]:
        for request, state in zip(self._requests, self._states, strict=True):
            request.totals = self.totals
            request.begin(state)
        decoding_since = time.perf_counter()
        try:
            for _ in self._prefill():
                yield
            decoding_since = time.perf_counter()
            while self._last and not self._cancelled():
                self._decode()
                yield
        finally:
            self._finish(decoding_since)

    def _prefill(self) -> Iterator[None]:
        ids = [request.ids for request in self._requests]
        passes = packed([one.size for one in ids], self._engine.chunk)
        done, total = 0, sum(one.size for one in ids)
        for i, parts in enumerate(passes):
            if self._cancelled():
                return
            ending = [k for k, _, _, ends in parts if ends]
            after = passes[i + 1] if i + 1 < len(passes) else [(0, 0, 0, True)]
            self._pass(
                [(k, ids[k][start:stop]) for k, start, stop, _ in parts], ending,
                next_head=any(ends for *_, ends in after), decoding=False,
            )  # fmt: skip
            done += sum(stop - start for _, start, stop, _ in parts)
            if self._progress is not None:
                self._progress(done, total)
            yield

    def _decode(self) -> None:
        parts = [(k, np.array([token], np.int32)) for k, token in self._last.items()]
        self._pass(parts, list(self._last), next_head=True, decoding=True)

    def _pass(
        self, parts: list[tuple[int, np.ndarray]], wanted: list[int], *, next_head: bool,
        decoding: bool,
    ) -> None:  # fmt: skip
        """One pass over (sequence, ids); those `wanted` choose a token by its logits."""
        group = StateGroup([(self._states[k], ids.size) for k, ids in parts])
        ends = np.cumsum([ids.size for _, ids in parts]) - 1
        rows = np.array([end for (k, _), end in zip(parts, ends, strict=True) if k in wanted])
        out = self._logits[: len(wanted)] if wanted else None
        self._engine.step(
            np.concatenate([ids for _, ids in parts]), out, self.totals, state=group,
            rows=rows if wanted else None, head=bool(wanted), next_head=next_head,
            decoding=decoding,
        )  # fmt: skip
        for row, k in enumerate(wanted):
            self._choose(k, self._logits[row])

    def _choose(self, k: int, logits: np.ndarray) -> None:
        request = self._requests[k]
        token = request.choose(logits)
        if request.take(token) is None or len(request.tokens) == request.max_new:
            self._last.pop(k, None)
            self._ended[k] = time.perf_counter()
        else:
            self._last[k] = token

    def _finish(self, decoding_since: float) -> None:
        now = time.perf_counter()
        n_tokens = self.totals.decode.tokens
        seconds = now - decoding_since
        figures = {
            "group_ms": seconds * 1e3,
            "group_predicted_n": n_tokens,
            "group_predicted_per_second": n_tokens / seconds if n_tokens else None,
        }
        for request, ended in zip(self._requests, self._ended, strict=True):
            request.end_in_group(ended or now, figures)


def packed(lengths: Sequence[int], room: int) -> list[list[Part]]:
    """Prompts of these lengths cut into passes of at most `room` tokens, in order."""
    passes: list[list[Part]] = [[]]
    free = room
    for k, n in enumerate(lengths):
        start = 0
        while start < n:
            stop = min(n, start + free)
            passes[-1].append((k, start, stop, stop == n))
            free -= stop - start
            start = stop
            if free == 0:
                passes.append([])
                free = room
    return [parts for parts in passes if parts]
