"""Sections of a .fit file (predictors/FIT.md section 3) from arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kernels.base import MAX_PLANES, low_bit_row_bytes
from ..predictors.low_bit import LowBitPredictor
from ..quant import WEIGHT_TYPES
from ..units import align_up

ENCODED = 32  # rows at once: encoding takes several times their size


@dataclass(frozen=True, eq=False)
class BitRows:
    """Rows of one number of bits: ascending bundle `ids`, `packed` as pack_planes gives them, and
    per row the scale of its odd levels and its bias."""

    planes: int
    ids: np.ndarray
    packed: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


def low_bit_form(parts: list[BitRows]) -> dict:
    rows = [0] * MAX_PLANES
    for part in parts:
        rows[part.planes - 1] = len(part.ids)
    return {"rows": rows}


def low_bit_section(n_bundles: int, parts: list[BitRows]) -> bytes:
    """`parts` in ascending order of planes, one for each number of bits in use."""
    planes = [part.packed.tobytes() for part in parts]
    scales = [part.scale.astype("<f4").tobytes() for part in parts]
    biases = [part.bias.astype("<f4").tobytes() for part in parts]
    kind = LowBitPredictor.id_type(n_bundles)
    ids = [part.ids.astype(kind).tobytes() for part in parts]
    return b"".join([*planes, *scales, *biases, *ids])


def pack_planes(codes: np.ndarray, n_planes: int) -> np.ndarray:
    """uint8 [n, row bytes] of uint8 codes [n, n_cols]; bits past n_cols are 0."""
    n, n_cols = codes.shape
    plane = low_bit_row_bytes(n_cols, 1)
    out = np.zeros((n, n_planes, plane), np.uint8)
    for p in range(n_planes):
        bits = np.packbits(codes >> p & 1, axis=1, bitorder="little")
        out[:, p, : bits.shape[1]] = bits
    return out.reshape(n, n_planes * plane)


def low_rank_section(a: np.ndarray, b: np.ndarray, bias: np.ndarray, weight_type: str) -> bytes:
    """From A [rank, hidden_size], B [n_bundles, rank] and bias [n_bundles]."""
    return _rows("int8", a) + _rows(weight_type, b.T) + bias.astype("<f4").tobytes()


def _rows(weight_type: str, rows: np.ndarray) -> bytes:
    kind = WEIGHT_TYPES[weight_type]
    n_bytes = kind.row_bytes(rows.shape[1])
    out = np.zeros((len(rows), align_up(n_bytes, 16)), np.uint8)
    for first in range(0, len(rows), ENCODED):
        part = np.ascontiguousarray(rows[first : first + ENCODED])
        out[first : first + ENCODED, :n_bytes] = kind.encode(part)
    return out.tobytes()
