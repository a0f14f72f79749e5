"""cos and sin of every position of a context, computed once, times the rope's attention factor.

Filled row by row: NumPy's vector code may round a transcendental differently by its place in an
array, and a row of fixed length is the same array whatever the context's size.  Angles are float32
products of position and frequency, as the published models were trained.
"""

from __future__ import annotations

import numpy as np

from .rope import Rope


class RopeTable:
    """float32 `cos` and `sin`, [n_context, n_rotated / 2] each."""

    def __init__(self, rope: Rope, n_context: int):
        inverse_frequencies = rope.inverse_frequencies()
        factor = np.float32(rope.attention_factor)
        self.cos = np.empty((n_context, inverse_frequencies.size), np.float32)
        self.sin = np.empty_like(self.cos)
        for position in range(n_context):
            angles = inverse_frequencies * np.float32(position)
            np.cos(angles, out=self.cos[position])
            np.sin(angles, out=self.sin[position])
            if factor != 1:
                self.cos[position] *= factor
                self.sin[position] *= factor

    @staticmethod
    def bytes_needed(n_rotated: int, n_context: int) -> int:
        return 4 * n_rotated * n_context

    def rows(self, positions: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos, sin of these n positions, float32 [n, n_rotated / 2]; views of a slice of them."""
        return self.cos[positions], self.sin[positions]
