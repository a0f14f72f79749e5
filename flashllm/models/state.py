"""What a sequence carries from token to token.

The engine asks a state only for `length`, `capacity`, `n_bytes`, `reset`, and what it holds as
named arrays; whether it is a KV cache, a recurrent state or both is between it and its family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from ..errors import ContextLengthError, UsageError


class SequenceState(ABC):
    """Memory of one sequence, allocated once for its whole context."""

    length: int  # tokens taken in so far
    capacity: int  # tokens it can hold

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """Bytes allocated."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything; memory stays."""

    @abstractmethod
    def holding(self, length: int) -> dict[str, np.ndarray]:
        """Views of what a state of `length` tokens consists of."""

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

    A layer's heads are contiguous over positions, so that attention walks keys in order.
    """

    def __init__(
        self, *, n_layers: int, n_kv_heads: int, head_dim: int, n_context: int, dtype: np.dtype
    ):
        shape = (n_layers, n_kv_heads, n_context, head_dim)
        self.keys = np.zeros(shape, dtype=dtype)
        self.values = np.zeros(shape, dtype=dtype)
        self.keys.fill(0)  # calloc's pages are not charged until written: pay for them now
        self.values.fill(0)
        self.capacity = n_context
        self.length = 0

    @staticmethod
    def bytes_per_token(
        *, n_layers: int, n_kv_heads: int, head_dim: int, dtype: np.dtype
    ) -> int:
        return 2 * n_layers * n_kv_heads * head_dim * np.dtype(dtype).itemsize

    @property
    def n_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(self, layer: int, position: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Store keys and values [T, n_kv_heads, head_dim] of positions position .. position+T-1."""
        stop = position + keys.shape[0]
        self.keys[layer, :, position:stop] = keys.transpose(1, 0, 2)
        self.values[layer, :, position:stop] = values.transpose(1, 0, 2)

    def reset(self) -> None:
        self.length = 0

    def holding(self, length: int) -> dict[str, np.ndarray]:
        return {"keys": self.keys[:, :, :length], "values": self.values[:, :, :length]}


class LatentCache(KVCache):
    """One array serves as keys and as values, of one head that all query heads share."""

    def __init__(self, *, n_layers: int, width: int, n_context: int, dtype: np.dtype):
        self.keys = self.values = np.zeros((n_layers, 1, n_context, width), dtype=dtype)
        self.keys.fill(0)
        self.capacity = n_context
        self.length = 0

    @property
    def n_bytes(self) -> int:
        return self.keys.nbytes

    def write(self, layer: int, position: int, keys: np.ndarray, values: np.ndarray) -> None:
        stop = position + keys.shape[0]
        self.keys[layer, :, position:stop] = keys.transpose(1, 0, 2)

    def holding(self, length: int) -> dict[str, np.ndarray]:
        return {"keys": self.keys[:, :, :length]}


class RecurrentState(SequenceState):
    """A state of constant size: named float32 arrays, one value of `empty` in each when empty.

    `capacity` is a number that no sequence reaches; nothing is allocated for it.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], *, empty: dict[str, float], capacity: int
    ):
        self.arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
        self._empty = empty
        self.capacity = capacity
        self.reset()

    @staticmethod
    def bytes_needed(shapes: dict[str, tuple[int, ...]]) -> int:
        return 4 * sum(int(np.prod(shape)) for shape in shapes.values())

    @property
    def n_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def reset(self) -> None:
        self.length = 0
        for name, array in self.arrays.items():
            array.fill(self._empty.get(name, 0.0))

    def holding(self, length: int) -> dict[str, np.ndarray]:
        return self.arrays
