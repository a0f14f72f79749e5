"""Block types of rwkv.cpp files: 32 values with a float16 scale d, some with an offset m or a
fifth bit apart.  Low nibbles are values 0 to 15, high nibbles 16 to 31; bit j of the 32-bit word is
the fifth bit of value j.  Type numbers are that project's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """`decode` takes uint8 [n, n_bytes] and gives float32 [n, 32]."""

    name: str
    n_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    word = np.ascontiguousarray(blocks[:, at : at + 4])
    return np.unpackbits(word, axis=1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return (_nibbles(blocks[:, 2:]).astype(np.float32) - 8) * _half(blocks, 0)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    levels = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return (levels.astype(np.float32) - 16) * _half(blocks, 0)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    levels = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return levels.astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


BLOCK_TYPES = {
    2: BlockType("Q4_0", 18, _q4_0),
    3: BlockType("Q4_1", 20, _q4_1),
    7: BlockType("Q5_0", 22, _q5_0),
    8: BlockType("Q5_1", 24, _q5_1),
    9: BlockType("Q8_0", 34, _q8_0),
}
