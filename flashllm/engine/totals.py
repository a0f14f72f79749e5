"""What the steps of a request did and took: prompt and decoding apart, sums only.

A step costs two looks at the clock and one at the kernels' own (about a microsecond); everything
else is worked out when somebody asks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..models.approximate import PredictedCounts


@dataclass
class Share:
    """Sums over steps of one kind.

    `stats` is the store's StepStats (None before the first step); `kernel_ns` nanoseconds inside
    native operators by the model's phases; `positions` the lengths of the sequence after them.
    """

    steps: int = 0
    tokens: int = 0
    wall_ns: int = 0
    positions: int = 0
    stats: Any = None
    kernel_ns: dict[str, int] = field(default_factory=dict)
    active_neurons: int = 0  # that added something, over tokens and sparse layers
    neurons: int = 0  # that there were to choose from

    def add(
        self, stats: Any, *, tokens: int, wall_ns: int, length: int, phases: tuple[str, ...],
        before: tuple[int, ...], after: tuple[int, ...],
    ) -> None:  # fmt: skip
        """One step; `before` and `after` are the kernels' clock, in the order of `phases`."""
        self.steps += 1
        self.tokens += tokens
        self.wall_ns += wall_ns
        self.positions += length
        for phase, start, stop in zip(phases, before, after, strict=True):
            self.kernel_ns[phase] = self.kernel_ns.get(phase, 0) + stop - start
        if self.stats is None:
            self.stats = stats
        else:
            self.stats.add(stats)

    def add_counts(self, counts: Any) -> None:
        """What a step's model counted (StepCounts)."""
        self.active_neurons += counts.active_neurons
        self.neurons += counts.n_neurons * counts.n_tokens

    def counters(self) -> dict[str, int]:
        return {} if self.stats is None else self.stats.as_dict()

    def parts_ns(self) -> dict[str, int]:
        """Where the steps' time went; disjoint, so that the values sum to `wall_ns`.

        wait, decode: the caller stood still for reads, and for coded bytes that had been read;
        attention, predict, ffn, head: inside native operators; submit: in native code that asks for
        reads and takes up what they brought; python: the rest, NumPy included.
        """
        if not self.steps:
            return {}
        counters = self.counters()
        decode = counters.get("decode_wait_ns", 0)
        wait = counters.get("wait_ns", 0) - decode
        parts = {"wait": wait, "decode": decode, "submit": counters.get("submit_ns", 0)}
        parts |= self.kernel_ns
        return {**parts, "python": self.wall_ns - sum(parts.values())}

    def mean_ms(self, n: int) -> dict[str, float]:
        """The same in milliseconds for each of `n` steps or tokens."""
        return {name: ns / n / 1e6 for name, ns in self.parts_ns().items()}


@dataclass
class Totals:
    """Sums over the steps of one request or of a group; `predicted` is of approximate decoding."""

    prompt: Share = field(default_factory=Share)
    decode: Share = field(default_factory=Share)
    choose_ns: int = 0  # choosing tokens after decode steps
    drafted: int = 0  # tokens taken in by decode steps on a guess
    accepted: int = 0  # of those
    predicted: PredictedCounts = field(default_factory=PredictedCounts)

    @property
    def n_decoded(self) -> int:
        """Tokens that decode steps brought."""
        return self.decode.tokens - (self.drafted - self.accepted)

    def counters(self) -> dict[str, int]:
        """The store's counters over all steps."""
        first, second = self.prompt.counters(), self.decode.counters()
        return {name: first.get(name, 0) + second.get(name, 0) for name in first | second}
