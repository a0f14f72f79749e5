"""One request from prompt ids to a Result: draws tokens, cuts at stops, keeps the times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..errors import ContextLengthError
from .engine import Engine
from .figures import flash_figures
from .results import Delta, Result
from .sampling import Sampler, SamplingParams, log_softmax
from .snapshot import Snapshot
from .stopping import StopStrings
from .totals import Share, Totals


class Request:
    """Runs once; `result` is there when `run` is exhausted or was closed early.

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
        self._choose_ns = 0  # sampling after decode steps
        self.params = params.resolved(generation_config)
        self._raw_ids, self._state = ids, state
        self._stop_ids = set(self.params.stop_token_ids)
        if not self.params.ignore_eos:
            self._stop_ids |= set(eos_ids)
        self.totals = Totals()
        self.tokens: list[int] = []
        self.result: Result | None = None
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] | None = (
            None if self.params.logprobs is None else []
        )

    def run(self) -> Iterator[Delta]:
        """Yield deltas; the last has a finish reason and the result."""
        self._engine.reset(self._state)
        ids = self._checked_ids()
        sampler = Sampler(self.params, ids)
        stops = StopStrings(self.params.stop, include_stop=self.params.include_stop)
        decoder = self._tokenizer.stream() if self._tokenizer else None
        started = time.perf_counter()
        first_at = None
        reason = "length"
        steps = self._engine.tokens(
            ids,
            lambda logits: self._choose(sampler, logits),
            self.totals,
            max_tokens=min(self.params.max_tokens, self._room(ids)),
            progress=self._prefill_progress,
            cancelled=self._cancelled,
        )
        tail = ""
        try:
            for token in steps:
                first_at = first_at or time.perf_counter()
                if token in self._stop_ids:
                    reason = "stop"
                    self._forget_logprobs()
                    break
                self._take(token)
                piece = stops.push(decoder.push(token)) if decoder else ""
                self._pieces.append(piece)
                if stops.stopped:
                    reason = "stop"
                    break
                yield Delta(piece, [token])
            else:
                reason = "cancelled" if self._cancelled() else "length"
            if stops.stopped:
                # The last piece was not handed out yet: it goes out with the reason.
                tail = self._pieces.pop()
            elif decoder:
                tail = stops.push(decoder.flush()) + stops.flush()
            self._pieces.append(tail)
        finally:
            steps.close()
            self._leave_pending(ids)
            ended = time.perf_counter()
            self.result = self._finish(ids, reason, started, first_at or ended, ended)
        last = self.tokens[-1:] if stops.stopped else []
        yield Delta(tail, last, reason, self.result)

    def _room(self, ids: np.ndarray) -> int:
        state = self._engine.state
        return state.capacity - state.length - ids.size

    def _leave_pending(self, ids: np.ndarray) -> None:
        """Tell the engine what was said and not computed: the last token, or more of a cancelled
        prompt."""
        first = self._state.length if self._state else 0
        n_taken = self._engine.state.length - first
        self._engine.pending = tuple([*map(int, ids), *self.tokens][n_taken:])

    def _checked_ids(self) -> np.ndarray:
        said = np.asarray(self._raw_ids)
        if self._state is not None and said.ndim == 1:
            said = np.array([*self._state.pending, *said.tolist()], dtype=np.int64)
        ids = self._engine.check_ids(said)
        if self._room(ids) < 1:
            raise ContextLengthError(ids.size + 1, self._engine.state.capacity)
        return ids

    def _choose(self, sampler: Sampler, logits: np.ndarray) -> int:
        started = time.perf_counter_ns()
        token = self._sample(sampler, logits)
        if self.totals.decode.steps:
            self._choose_ns += time.perf_counter_ns() - started
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

    def _take(self, token: int) -> None:
        self.tokens.append(token)
        # /proc is read every 16 tokens: often enough to see a peak of our own making, and 16
        # times cheaper than every token.
        if len(self.tokens) % 16 == 0:
            self._memory.sample()

    def _forget_logprobs(self) -> None:
        """A token that ended the text is not part of it."""
        if self._logprobs is not None:
            self._logprobs.pop()

    def _prefill_progress(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total, "prompt")

    def _finish(self, ids, reason, started, first_at, ended) -> Result:
        n_prompt, n_new = int(ids.size), len(self.tokens)
        prompt_s, predicted_s = first_at - started, ended - first_at
        # The first token's time belongs to the prompt; n - 1 steps made the rest.
        steps = max(0, n_new - 1)
        timings = {
            "prompt_n": n_prompt,
            "prompt_ms": prompt_s * 1e3,
            "prompt_per_second": n_prompt / prompt_s if prompt_s else None,
            "predicted_n": n_new,
            "predicted_ms": predicted_s * 1e3,
            "predicted_per_second": steps / predicted_s if steps and predicted_s else None,
            "load_ms": self._load_ms,
            "ttft_ms": prompt_s * 1e3,
            "per_token_ms": self._per_token_ms(predicted_s),
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
            finish_reason=reason,
            seed=self.params.seed,
            usage=usage,
            timings=timings,
            flash=self.figures() | self._floor_figures(),
            logprobs=self._logprobs,
            params=asdict(self.params),
        )

    def _per_token_ms(self, predicted_s: float) -> dict[str, float]:
        """Where the mean decoded token's time went; the values sum to predicted_ms over steps."""
        decode = self.totals.decode
        parts = decode.per_step_ms()
        if not parts:
            return {}
        parts["sampling"] = self._choose_ns / decode.steps / 1e6
        # Text, stop strings, and what the caller does between two tokens of a stream.
        parts["other"] = 1e3 * predicted_s / decode.steps - sum(parts.values())
        return parts

    def _floor_figures(self) -> dict[str, Any]:
        """Per decoded token: bytes and reads.  Of that token, and of the whole prompt: the floors
        of DRAM and flash, and the ratio of the steps' time to the larger floor."""
        prompt, decode = self.totals.prompt, self.totals.decode
        n, counters = max(1, decode.steps), decode.counters()
        least, ratio = self._least(decode)
        least_prompt, prompt_ratio = self._least(prompt)
        return {
            "bytes_per_token": counters.get("bytes_read", 0) / n,
            "reads_per_token": counters.get("reads", 0) / n,
            "floor_ms": least,
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
