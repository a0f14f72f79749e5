"""One request from prompt ids to a Result: draws tokens, cuts at stops, keeps the times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..errors import ContextLengthError
from ..models.state import SequenceState
from .engine import Engine
from .figures import flash_figures
from .results import Delta, Result
from .sampling import Sampler, SamplingParams, log_softmax
from .snapshot import Snapshot
from .speculation import Speculation
from .stopping import StopStrings
from .totals import Share, Totals


class Request:
    """Runs once, by `run` or as one of a group (group.py); `result` is there when it has ended.

    `tokenizer` may be None (ids only).  `memory` answers `.peaks()` -> dict of bytes; `floors` what
    the mean step of a Share cannot be faster than, in ms by reason.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        ids: Sequence[int] | np.ndarray,
        params: SamplingParams,
        generation_config: dict[str, Any],
        eos_ids: Sequence[int],
        tokenizer: Any,
        memory: Any,
        load_ms: float,
        facts: dict[str, Any],
        cancelled: Callable[[], bool],
        progress: Callable[[int, int, str], None] | None = None,
        state: Snapshot | None = None,
        floors: Callable[[Share], dict[str, float]] = lambda share: {},
    ):
        self._engine, self._tokenizer, self._memory = engine, tokenizer, memory
        self._facts, self._load_ms, self._cancelled = facts, load_ms, cancelled
        self._progress, self._floors = progress, floors
        self.params = params.resolved(generation_config)
        self._snapshot = state
        self._state: SequenceState | None = None  # while it runs
        self.ids = self._checked_ids(ids)
        self.max_new = min(self.params.max_tokens, self._room(self.ids.size))
        self._stop_ids = set(self.params.stop_token_ids)
        if not self.params.ignore_eos:
            self._stop_ids |= set(eos_ids)
        self.totals = Totals()
        self.tokens: list[int] = []
        self.result: Result | None = None
        self._first_at: float | None = None  # when the first token was chosen
        self._reason = "length"
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] | None = (
            None if self.params.logprobs is None else []
        )

    # -- the two ways to run

    def run(self) -> Iterator[Delta]:
        """Yield deltas; the last has a finish reason and the result."""
        self.begin(self._engine.state)
        speculation = Speculation(self._engine, self.totals, self.ids)
        steps = self._engine.tokens(
            self.ids,
            self.choose,
            self.totals,
            max_tokens=self.max_new,
            after=speculation.after,
            progress=self._prefill_progress,
            cancelled=self._cancelled,
        )
        tail = ""
        try:
            for token in steps:
                piece = self.take(token)
                if piece is None:
                    break
                yield Delta(piece, [token])
            else:
                self._reason = "cancelled" if self._cancelled() else "length"
            tail = self._last_text()
        finally:
            steps.close()
            speculation.settle()
            self.end(time.perf_counter())
        last = self.tokens[-1:] if self._stops.stopped else []
        yield Delta(tail, last, self._reason, self.result)

    def begin(self, state: SequenceState) -> None:
        """Start the clock and an empty sequence (or the one that was saved) in `state`."""
        self._state = state
        self._engine.reset(self._snapshot, state)
        self._sampler = Sampler(self.params, self.ids)
        self._stops = StopStrings(self.params.stop, include_stop=self.params.include_stop)
        self._decoder = self._tokenizer.stream() if self._tokenizer else None
        self._started = time.perf_counter()

    def take(self, token: int) -> str | None:
        """Another token was chosen: the text that may be shown, None where the text ends."""
        self._first_at = self._first_at or time.perf_counter()
        if token in self._stop_ids:
            self._reason = "stop"
            self._forget_logprobs()
            return None
        self.tokens.append(token)
        # /proc is read every 16 tokens: often enough to see a peak of our own making, and 16
        # times cheaper than every token.
        if len(self.tokens) % 16 == 0:
            self._memory.sample()
        piece = self._stops.push(self._decoder.push(token)) if self._decoder else ""
        self._pieces.append(piece)
        if self._stops.stopped:
            self._reason = "stop"
            return None
        return piece

    def end_in_group(self, ended: float, group: dict[str, Any]) -> None:
        """The group is done with this sequence: its text is whole.  `group` goes to the timings."""
        if self._reason == "length" and len(self.tokens) < self.max_new:
            self._reason = "cancelled"
        self._last_text()
        self.end(ended, group)

    def _last_text(self) -> str:
        """The end of the text, which no token after it can change any more."""
        if self._stops.stopped:
            # The last piece was not handed out yet: it goes out with the reason.
            tail = self._pieces.pop()
        elif self._decoder:
            tail = self._stops.push(self._decoder.flush()) + self._stops.flush()
        else:
            tail = ""
        self._pieces.append(tail)
        return tail

    def end(self, ended: float, group: dict[str, Any] | None = None) -> None:
        self._leave_pending()
        self._state = None  # a group's goes away before the memory it took is used again
        self.result = self._finish(ended, group or {})

    def note(self, **facts: Any) -> None:
        """More for the `flash` part of the result."""
        self._facts |= facts

    @property
    def n_positions(self) -> int:
        """Room that a state needs for all of this sequence."""
        taken = self._snapshot.length if self._snapshot else 0
        return taken + self.ids.size + self.max_new

    def _room(self, n_ids: int) -> int:
        taken = self._snapshot.length if self._snapshot else 0
        return self._engine.state.capacity - taken - n_ids

    def _leave_pending(self) -> None:
        """Tell the engine what was said and not computed: the last token, or more of a cancelled
        prompt."""
        if self._state is self._engine.state:
            n_taken = self._state.length - (self._snapshot.length if self._snapshot else 0)
            self._engine.pending = tuple([*map(int, self.ids), *self.tokens][n_taken:])

    def _checked_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        said, taken = np.asarray(ids), 0
        if self._snapshot is not None:
            taken, room = self._snapshot.length, self._engine.state.capacity
            if taken > room:
                raise ContextLengthError(taken, room, "state")
            if said.ndim == 1:
                said = np.array([*self._snapshot.pending, *said.tolist()], dtype=np.int64)
        ids = self._engine.check_ids(said, taken=taken)
        if self._room(ids.size) < 1:
            raise ContextLengthError(taken + ids.size + 1, self._engine.state.capacity)
        return ids

    def choose(self, logits: np.ndarray) -> int:
        started = time.perf_counter_ns()
        token = self._sample(self._sampler, logits)
        if self.totals.decode.steps:
            self.totals.choose_ns += time.perf_counter_ns() - started
        return token

    def _sample(self, sampler: Sampler, logits: np.ndarray) -> int:
        token = sampler.sample(logits)
        if self._logprobs is not None:
            logp = log_softmax(logits)
            top = np.argsort(-logp, kind="stable")[: self.params.logprobs]
            self._logprobs.append(
                {
                    "token": token,
                    "logprob": float(logp[token]),
                    "top_logprobs": {int(i): float(logp[i]) for i in top},
                }
            )
        return token

    def _forget_logprobs(self) -> None:
        """A token that ended the text is not part of it."""
        if self._logprobs is not None:
            self._logprobs.pop()

    def _prefill_progress(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total, "prompt")

    def _finish(self, ended: float, group: dict[str, Any]) -> Result:
        n_prompt, n_new = int(self.ids.size), len(self.tokens)
        first_at = self._first_at or ended
        prompt_s, predicted_s = first_at - self._started, ended - first_at
        # The first token's time belongs to the prompt; n - 1 steps made the rest.
        steps = max(0, n_new - 1)
        timings = {
            "prompt_n": n_prompt,
            "prompt_ms": prompt_s * 1e3,
            "prompt_per_second": n_prompt / prompt_s if prompt_s else None,
            "predicted_n": n_new,
            "predicted_ms": predicted_s * 1e3,
            "predicted_per_second": steps / predicted_s if steps and predicted_s else None,
            "draft_n": self.totals.drafted,
            "draft_n_accepted": self.totals.accepted,
            "load_ms": self._load_ms,
            "ttft_ms": prompt_s * 1e3,
            "per_token_ms": self._per_token_ms(group.get("group_ms", predicted_s * 1e3)),
            **group,
        }
        usage = {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        self._memory.sample()
        return Result(
            text="".join(self._pieces) if self._tokenizer else None,
            tokens=self.tokens,
            finish_reason=self._reason,
            seed=self.params.seed,
            usage=usage,
            timings=timings,
            flash=self.figures() | self._floor_figures(),
            logprobs=self._logprobs,
            params=asdict(self.params),
        )

    def _per_token_ms(self, spent_ms: float) -> dict[str, float]:
        """Where the mean decoded token's time went; the values sum to `spent_ms` over tokens."""
        n = self.totals.n_decoded
        if not n:
            return {}
        parts = self.totals.decode.mean_ms(n)
        parts["sampling"] = self.totals.choose_ns / n / 1e6
        # Text, stop strings, and what the caller does between two tokens of a stream.
        parts["other"] = spent_ms / n - sum(parts.values())
        return parts

    def _floor_figures(self) -> dict[str, Any]:
        """Per decoded token: bytes and reads.  Of that token, and of the whole prompt: the floors
        of DRAM and flash, and the ratio of the steps' time to the larger floor."""
        prompt, decode = self.totals.prompt, self.totals.decode
        n, counters = max(1, self.totals.n_decoded), decode.counters()
        least, ratio = self._least(decode)
        least_prompt, prompt_ratio = self._least(prompt)
        return {
            "bytes_per_token": counters.get("bytes_read", 0) / n,
            "reads_per_token": counters.get("reads", 0) / n,
            "floor_ms": {name: ms * decode.steps / n for name, ms in least.items()},
            "time_over_floor": ratio,
            "prompt_floor_ms": {name: ms * prompt.steps for name, ms in least_prompt.items()},
            "prompt_time_over_floor": prompt_ratio,
        }

    def _least(self, share: Share) -> tuple[dict[str, float], float | None]:
        """Floors of the share's mean step in ms, and its time over the larger."""
        floors = self._floors(share) if share.steps else {}
        largest = max(floors.values(), default=0.0)
        return floors, share.wall_ns / share.steps / 1e6 / largest if largest else None

    def figures(self) -> dict[str, Any]:
        """The `flash` part of the result, as it stands now."""
        return {
            **self._facts,
            **flash_figures(self.totals),
            **self._memory.peaks(),
            "truncated_prompt_tokens": 0,
        }
