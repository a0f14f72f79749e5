"""A token's pass as parts, of which those that only call operators are recorded and repeated.

Between two operators the interpreter finds its code pushed out of the caches by weights: with a
model of 1.1 B all in memory, seven calls a layer took 4 of 48 ms.  So the first token of a sequence
goes as ever, while the kernel set keeps its calls; tokens after it are those calls again, stretch
by stretch.  A part may be repeated when it does nothing but call operators, on arrays that stay
where they are, and when nothing but the position and the arrays' contents differ from token to
token; the family says which are.  Whether that is true is tried once: a recording serves when it
has repeated the stretch that it was made of to the same bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .state import SequenceState


@dataclass(frozen=True)
class Part:
    """Something that a pass does, called with the model and `state`: what kept the model here would
    keep its memory after its last user."""

    run: Callable[..., None]
    repeatable: bool = False


@dataclass
class _Stretch:
    """Parts one after another, all of them repeatable or all not, and what was recorded of them."""

    repeatable: bool
    parts: list[Part] = field(default_factory=list)
    calls: Any = None


class Repeats:
    """What one model records, for one state at a time."""

    def __init__(self, kernels):
        self._kernels = kernels
        self._state: weakref.ref | None = None  # not kept alive, and nor is its memory
        self._key: Hashable = None
        self._stretches: list[_Stretch] = []

    @property
    def n_recorded(self) -> int:
        """Stretches that are repeated now."""
        return sum(stretch.calls is not None for stretch in self._stretches)

    def run(
        self, model, state: SequenceState, key: Hashable, parts: Callable[[], Iterable[Part]],
        live: Callable[[], Sequence[np.ndarray]],
    ) -> None:  # fmt: skip
        """Run the parts of one token's pass at the end of `state`.

        parts  makes them; asked again when state or `key`, what they depend on, is another
        live   gives arrays that a part finds filled by those before it, besides state and
               scratch; asked when something is recorded
        """
        if self._state is None or self._state() is not state or self._key != key:
            self._stretches = _stretches(parts())
            self._state, self._key = weakref.ref(state), key
        position = state.length
        for stretch in self._stretches:
            if stretch.calls is not None:
                self._kernels.repeat(stretch.calls, position)
            elif stretch.repeatable:
                self._record(stretch, model, state, live())
            else:
                for part in stretch.parts:
                    part.run(model, state=state)

    def _record(self, stretch: _Stretch, model, state: SequenceState, live) -> None:
        before = [array.copy() for array in live]
        with self._kernels.recording() as recorded:
            for part in stretch.parts:
                part.run(model, state=state)
        stretch.repeatable = False  # unless it proves to be
        if recorded.calls is None:
            return
        after = [array.copy() for array in live]
        for array, values in zip(live, before, strict=True):
            np.copyto(array, values)
        self._kernels.repeat(recorded.calls, state.length)
        if all(a.tobytes() == b.tobytes() for a, b in zip(live, after, strict=True)):
            stretch.repeatable, stretch.calls = True, recorded.calls
            return
        for array, values in zip(live, before, strict=True):
            np.copyto(array, values)
        for part in stretch.parts:  # once more: the wrong repetition has written into the state
            part.run(model, state=state)



def _stretches(parts: Iterable[Part]) -> list[_Stretch]:
    found: list[_Stretch] = []
    for part in parts:
        if not found or found[-1].repeatable != part.repeatable:
            found.append(_Stretch(part.repeatable))
        found[-1].parts.append(part)
    return found
