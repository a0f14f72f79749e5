"""From logits to the next token: the parameters people know, one rule for defaults.

An explicit argument wins, else the model's generation config, else greedy.  The draw uses one
uniform number per token from a generator seeded per request, so that what else the process does
cannot change a sequence.  Ties go to the lowest id.
"""

from __future__ import annotations

import difflib
import random
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np

from ..errors import UsageError

# Below it logits could be divided beyond what float64 holds, and greedy is what it means.
LEAST_TEMPERATURE = 1e-200

ALIASES = {"max_new_tokens": "max_tokens", "repeat_penalty": "repetition_penalty"}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What to generate and how to draw it.

    `None` for temperature, top_p, top_k, min_p and repetition_penalty means: what the model's
    generation config says, else the neutral value (temperature 0, which is greedy).
    `logprobs` asks for that many most likely tokens per step beside the chosen one.
    """

    max_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, kind in (("stop", str), ("stop_token_ids", (int, np.integer))):
            given = () if getattr(self, name) is None else getattr(self, name)
            if not isinstance(given, Iterable) or not all(isinstance(s, kind) for s in given):
                wanted = "non-empty strings" if kind is str else "whole numbers"
                raise UsageError(f"{name} must be {wanted}, not {given!r}")
            object.__setattr__(self, name, tuple(s if kind is str else int(s) for s in given))
        if not all(self.stop):
            raise UsageError("stop must be non-empty strings")
        self._in_range("max_tokens", 1, 2**31 - 1, whole=True)
        self._in_range("temperature", 0.0, 1e4)
        self._in_range("top_p", 0.0, 1.0)
        self._in_range("top_k", 0, 2**31 - 1, whole=True)
        self._in_range("min_p", 0.0, 1.0)
        self._in_range("repetition_penalty", 1e-3, 1e3)
        self._in_range("presence_penalty", -1e3, 1e3)
        self._in_range("frequency_penalty", -1e3, 1e3)
        self._in_range("seed", 0, 2**64 - 1, whole=True)
        self._in_range("logprobs", 0, 100, whole=True)

    def _in_range(self, name: str, low: float, high: float, whole: bool = False) -> None:
        value = getattr(self, name)
        if value is None:
            return
        kind = "whole number" if whole else "number"
        right_type = isinstance(value, (int, np.integer) if whole else (int, float, np.number))
        if isinstance(value, bool) or not right_type or not low <= value <= high:
            raise UsageError(f"{name} must be a {kind} from {low} to {high}, not {value!r}")

    @classmethod
    def from_kwargs(cls, base: SamplingParams | None = None, **kwargs: object) -> SamplingParams:
        """`base` with `kwargs` laid over it; an unknown name is an error that names the nearest."""
        known = [f.name for f in fields(cls)]
        named: dict[str, object] = {}
        for given, value in kwargs.items():
            name = ALIASES.get(given, given)
            if name not in known:
                close = difflib.get_close_matches(given, [*known, *ALIASES], n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
                raise UsageError(f"unknown sampling parameter {given!r}{hint}")
            if name in named:
                raise UsageError(f"{name!r} is given twice (also as {given!r})")
            named[name] = value
        return replace(base, **named) if base is not None else cls(**named)

    def resolved(self, generation_config: dict[str, object]) -> SamplingParams:
        """No `None` left among the drawing knobs; a seed is chosen when none was given.

        `do_sample` false or absent in the generation config means greedy, as transformers reads
        it: its temperature, top_p and top_k then have no say.
        """
        sampled = bool(generation_config.get("do_sample"))
        neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        chosen: dict[str, object] = {}
        for name, default in neutral.items():
            if getattr(self, name) is None:
                from_model = generation_config.get(name) if sampled else None
                if sampled and name == "temperature" and from_model is None:
                    from_model = 1.0
                chosen[name] = default if from_model is None else from_model
        if self.repetition_penalty is None:
            chosen["repetition_penalty"] = generation_config.get("repetition_penalty") or 1.0
        if self.seed is None:
            chosen["seed"] = secrets.randbits(32)
        return replace(self, **chosen)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 log-probabilities of float32 logits [V]."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - np.log(np.exp(shifted).sum())


class Sampler:
    """Draws tokens for one request; owns its random generator and its penalty counts."""

    def __init__(self, params: SamplingParams, prompt_ids: np.ndarray):
        self.params = params
        self._random = random.Random(params.seed)
        self._seen: dict[int, int] = {}  # generated token -> count, for the OpenAI penalties
        self._context = {int(i) for i in prompt_ids}  # the repetition penalty counts the prompt

    def sample(self, logits: np.ndarray) -> int:
        """The next token id from float32 logits [V]; records it for the penalties."""
        params = self.params
        logits = self._penalised(logits)
        if params.temperature < LEAST_TEMPERATURE or params.top_k == 1:
            token = int(np.argmax(logits))
        else:
            token = self._draw(logits.astype(np.float64) / params.temperature)
        self._seen[token] = self._seen.get(token, 0) + 1
        self._context.add(token)
        return token

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        params = self.params
        neutral = params.repetition_penalty == 1.0
        if neutral and not params.presence_penalty and not params.frequency_penalty:
            return logits
        logits = logits.copy()
        if not neutral:
            ids = np.fromiter(sorted(self._context), dtype=np.int64)
            ids = ids[ids < logits.size]
            values = logits[ids]
            factor = np.float32(params.repetition_penalty)
            logits[ids] = np.where(values > 0, values / factor, values * factor)
        for token, count in self._seen.items():
            logits[token] -= params.presence_penalty + params.frequency_penalty * count
        return logits

    def _draw(self, scaled: np.ndarray) -> int:
        params = self.params
        order = np.argsort(-scaled, kind="stable")  # stable: equal logits keep the lowest id first
        if params.top_k:
            order = order[: params.top_k]
        weights = np.exp(scaled[order] - scaled[order[0]])
        if params.min_p > 0.0:
            keep = int(np.count_nonzero(weights >= params.min_p * weights[0]))
            order, weights = order[:keep], weights[:keep]
        cumulative = np.cumsum(weights)
        if params.top_p < 1.0:
            # The smallest set whose mass reaches top_p; at least the most likely token.
            keep = int(np.searchsorted(cumulative, params.top_p * cumulative[-1])) + 1
            cumulative = cumulative[:keep]
        point = self._random.random() * cumulative[-1]
        chosen = np.searchsorted(cumulative, point, side="right")
        return int(order[min(chosen, cumulative.size - 1)])
