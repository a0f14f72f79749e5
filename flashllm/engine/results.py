"""What a request hands back: the shapes of CONVENTIONS that callers and `--json` rely on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Result:
    """One finished completion.

    `text` is None without a tokenizer; `tokens` are the completion's ids only; `finish_reason` is
    "stop", "length" or "cancelled".  `usage` has OpenAI's names, `timings` llama.cpp's (ms and
    tokens per second), `flash` ours (bytes, counts, ms).
    """

    text: str | None
    tokens: list[int]
    finish_reason: str
    seed: int
    usage: dict[str, Any]
    timings: dict[str, Any]
    flash: dict[str, Any]
    logprobs: list[dict[str, Any]] | None = None
    params: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __str__(self) -> str:
        return self.text or ""


class Delta(str):
    """A piece of streamed text: a str, so that "".join(stream) is the whole text.

    `tokens` are the ids that became known with it; the last delta carries the `result`.
    """

    tokens: list[int]
    finish_reason: str | None
    result: Result | None

    def __new__(
        cls,
        text: str,
        tokens: list[int] | None = None,
        finish_reason: str | None = None,
        result: Result | None = None,
    ) -> Delta:
        delta = super().__new__(cls, text)
        delta.tokens = tokens or []
        delta.finish_reason = finish_reason
        delta.result = result
        return delta

    @property
    def text(self) -> str:
        return str(self)
