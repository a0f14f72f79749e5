"""What a sequence carries from token to token.

The engine asks a state only for `length`, `capacity`, `n_bytes`, `reset`, and what it holds as
named arrays; whether it is a KV cache, a recurrent state or both is between it and its family.
A pass asks whose its rows are, because it may be over tokens of several sequences (StateGroup).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from ..errors import ContextLengthError, UsageError
from .pages import LendingRows, own_pages, spare_bytes


class SequenceState(ABC):
    """Memory of one sequence, allocated once for its whole context."""

    length: int  # tokens taken in so far
    capacity: int  # tokens it can hold

    def spans(self, n_tokens: int) -> Sequence[tuple[slice, SequenceState]]:
        """Whose the rows of a pass over `n_tokens` are: rows and their state, rows ascending."""
        return ((slice(0, n_tokens), self),)

    def positions(self, n_tokens: int) -> slice | np.ndarray:
        """Absolute positions of those rows: what a table of positions is indexed by."""
        return slice(self.length, self.length + n_tokens)

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """Bytes allocated."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything; memory stays."""

    @abstractmethod
    def make_marks(self, n: int) -> None:
        """Room to rewind into passes of up to n + 1 tokens."""

    @abstractmethod
    def mark(self, n_tokens: int) -> None:
        """The next pass takes `n_tokens` of this sequence, and may be rewound into."""

    @abstractmethod
    def rewind(self, length: int) -> None:
        """As it was when it held `length` tokens, one at least of the pass before which `mark` was
        called; nothing was taken in since."""

    @abstractmethod
    def holding(self, length: int) -> dict[str, np.ndarray]:
        """Views of what a state of `length` tokens consists of."""

    @abstractmethod
    def hold(self, n_tokens: int) -> None:
        """Have memory for so many tokens, `length` at least, and lend that of the others."""

    @abstractmethod
    def spare_bytes(self, n_tokens: int) -> int:
        """What `hold` lends."""

    def restore(self, length: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `holding(length)` gave elsewhere; UsageError where it is another shape."""
        if not 0 <= length <= self.capacity:
            raise ContextLengthError(length, self.capacity, "state")
        places = self.holding(length)
        found = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
        wanted = {name: (array.dtype.str, array.shape) for name, array in places.items()}
        if found != wanted:
            raise UsageError(f"state of {found} does not fit this model's {wanted}")
        for name, place in places.items():
            np.copyto(place, arrays[name])
        self.length = length


class KVCache(SequenceState):
    """Keys and values of every layer, [n_layers, n_kv_heads, n_context, head_dim].

    A layer's heads are contiguous over positions, so that attention walks keys in order.  At first
    there is memory for `held` tokens, all of them unless said.
    """

    n_arrays: ClassVar[int] = 2

    def __init__(
        self, *, n_layers: int, n_kv_heads: int, head_dim: int, n_context: int, dtype: np.dtype,
        held: int | None = None,
    ):  # fmt: skip
        shape = (n_layers, n_kv_heads, n_context, head_dim)
        self._rows = [
            LendingRows(n_layers * n_kv_heads, n_context * head_dim, dtype)
            for _ in range(self.n_arrays)
        ]
        self.keys, self.values = (self._rows[i].array.reshape(shape) for i in (0, -1))
        self.capacity = n_context
        self.length = 0
        self.hold(n_context if held is None else held)

    @staticmethod
    def bytes_per_token(
        *, n_layers: int, n_kv_heads: int, head_dim: int, dtype: np.dtype
    ) -> int:
        return 2 * n_layers * n_kv_heads * head_dim * np.dtype(dtype).itemsize

    @property
    def n_bytes(self) -> int:
        return self.n_arrays * self.keys.nbytes

    def hold(self, n_tokens: int) -> None:
        for rows in self._rows:
            rows.hold(n_tokens * self.keys.shape[-1])

    def spare_bytes(self, n_tokens: int) -> int:
        n_layers, n_heads, n_context, width = self.keys.shape
        each = width * self.keys.itemsize
        return self.n_arrays * spare_bytes(n_layers * n_heads, n_context * each, n_tokens * each)

    def write(self, layer: int, position: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Store keys and values [T, n_kv_heads, head_dim] of positions position .. position+T-1."""
        stop = position + keys.shape[0]
        self.keys[layer, :, position:stop] = keys.transpose(1, 0, 2)
        self.values[layer, :, position:stop] = values.transpose(1, 0, 2)

    def reset(self) -> None:
        self.length = 0

    def make_marks(self, n: int) -> None:
        """None: see `mark`."""

    def mark(self, n_tokens: int) -> None:
        """Positions after the length are never read: there is nothing to keep."""

    def rewind(self, length: int) -> None:
        self.length = length

    def holding(self, length: int) -> dict[str, np.ndarray]:
        return {"keys": self.keys[:, :, :length], "values": self.values[:, :, :length]}


class LatentCache(KVCache):
    """One array serves as keys and as values, of one head that all query heads share."""

    n_arrays = 1

    def write(self, layer: int, position: int, keys: np.ndarray, values: np.ndarray) -> None:
        stop = position + keys.shape[0]
        self.keys[layer, :, position:stop] = keys.transpose(1, 0, 2)

    def holding(self, length: int) -> dict[str, np.ndarray]:
        return {"keys": self.keys[:, :, :length]}


class RecurrentState(SequenceState):
    """A state of constant size: named float32 arrays, one value of `empty` in each when empty.

    `capacity` is a number that no sequence reaches; nothing is allocated for it.  There is no way
    back from a token but a copy of what was there before: `n_marked` is the number of tokens of the
    pass to come for which copies are kept, 0 for none.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], *, empty: dict[str, float], capacity: int
    ):
        self.arrays = {name: own_pages(shape, np.float32) for name, shape in shapes.items()}
        self._empty = empty
        self._marks: list[dict[str, np.ndarray]] = []
        self.capacity = capacity
        self.reset()

    @staticmethod
    def bytes_needed(shapes: dict[str, tuple[int, ...]]) -> int:
        return 4 * sum(int(np.prod(shape)) for shape in shapes.values())

    @property
    def n_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def hold(self, n_tokens: int) -> None:
        """Nothing grows, nothing is lent."""

    def spare_bytes(self, n_tokens: int) -> int:
        return 0

    def make_marks(self, n: int) -> None:
        """What the state holds after the last token of a pass is the state itself."""
        shapes = {name: array.shape for name, array in self.arrays.items()}
        self._marks = [
            {name: own_pages(shape, np.float32) for name, shape in shapes.items()}
            for _ in range(n)
        ]

    def mark(self, n_tokens: int) -> None:
        if n_tokens - 1 > len(self._marks):
            raise AssertionError(f"a pass of {n_tokens} tokens and {len(self._marks)} marks")
        self.n_marked = n_tokens

    def keep(self, name: str, layer: int, i: int, values: np.ndarray) -> None:
        """What the row `layer` of an array holds after token i of the pass that was marked."""
        if i < self.n_marked - 1:
            self._marks[i][name][layer] = values

    def rewind(self, length: int) -> None:
        last = self.n_marked - 1 - (self.length - length)  # token of the pass that is kept
        if last < self.n_marked - 1:
            for name, array in self.arrays.items():
                np.copyto(array, self._marks[last][name])
        self.length, self.n_marked = length, 0

    def reset(self) -> None:
        self.length = self.n_marked = 0
        for name, array in self.arrays.items():
            array.fill(self._empty.get(name, 0.0))

    def holding(self, length: int) -> dict[str, np.ndarray]:
        return self.arrays


class StateGroup:
    """Sequences that share a pass: its rows are theirs in turn, so many tokens of each.

    Every sequence sees its own memory and positions only (docs/ARITHMETIC.md, "Rows").
    """

    def __init__(self, parts: Sequence[tuple[SequenceState, int]]):
        self._spans, first = [], 0
        for state, n_tokens in parts:
            self._spans.append((slice(first, first + n_tokens), state))
            first += n_tokens
        self.n_tokens = first

    def spans(self, n_tokens: int) -> Sequence[tuple[slice, SequenceState]]:
        if n_tokens != self.n_tokens:
            raise UsageError(f"a group of {self.n_tokens} tokens in a pass over {n_tokens}")
        return self._spans

    def positions(self, n_tokens: int) -> np.ndarray:
        spans = self.spans(n_tokens)
        every = [np.arange(s.length, s.length + r.stop - r.start) for r, s in spans]
        return np.concatenate(every)
