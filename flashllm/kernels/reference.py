"""The oracle: every operator in NumPy, token by token, sums in float64 rounded once.

Slow on purpose and read before anything in ext/.  It works on the same address tables as the native
sets and quantises activations to the same bits; it has no threads.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np

from ..errors import KernelError
from ..quant import BY_CODE, GROUP
from .base import Activations, KernelSet, NoClock, PieceView
from .reference_rwkv import ReferenceRecurrences, sigmoid

TINY = np.float32(2.0**-100)


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [groups, 32], float32 scales [groups]) of one token's x [n]; see docs/ARITHMETIC.md."""
    groups = -(-len(x) // GROUP)
    padded = np.zeros((groups, GROUP), dtype=np.float32)
    padded.reshape(-1)[: len(x)] = x
    most = np.abs(padded).max(axis=1)
    usable = np.isfinite(most) & (most >= TINY)
    divisor = np.where(usable, most, np.float32(127))
    levels = np.where(usable[:, None], padded, 0) * (np.float32(127) / divisor)[:, None]
    scales = np.where(usable, divisor / np.float32(127), np.float32(0))
    scales = np.where(np.isfinite(most), scales, np.float32("nan"))
    return np.rint(levels).astype(np.int8), scales


class ReferenceSet(ReferenceRecurrences, KernelSet):
    """NumPy; one thread whatever was asked."""

    name = "reference"

    def __init__(self, *, n_threads: int):
        self.n_threads = 1
        self.clock = NoClock()

    def attention_scratch(self, n_context: int) -> int:
        return 0  # NumPy's temporaries come and go

    # -------------------------------------------------------------------------------------- items

    def _raw(self, addresses, piece: PieceView, ids, start: int, n: int) -> np.ndarray:
        """uint8 [n, row_bytes]: copies of the rows of items `ids`, or start..start+n-1."""
        row_bytes = BY_CODE[piece.weight_type].row_bytes(piece.n_cols)
        raw = np.empty((n, row_bytes), dtype=np.uint8)
        for k in range(n):
            item = int(ids[k]) if ids is not None else start + k
            frame, within = divmod(item, piece.per_frame)
            if not 0 <= frame < len(addresses):
                raise KernelError("an item id lies outside the plane's frames")
            address = int(addresses[frame])
            if address == 0:
                raise KernelError("a frame in use is absent (address 0)")
            if address % 16:
                raise KernelError("a frame's address is no multiple of 16")
            at = address + within * piece.stride + piece.offset
            raw[k] = np.frombuffer((ctypes.c_uint8 * row_bytes).from_address(at), dtype=np.uint8)
        return raw

    @staticmethod
    def _ascending(ids) -> None:
        if ids is not None and (np.diff(ids) <= 0).any():
            raise KernelError("item ids must ascend strictly")

    @staticmethod
    def _parts(raw: np.ndarray, piece: PieceView) -> tuple[np.ndarray, np.ndarray]:
        """Levels q and scales of integer rows: float32 [n, groups, 32] and [n, groups]."""
        weight_type = BY_CODE[piece.weight_type]
        groups = -(-piece.n_cols // GROUP)
        ones = raw.copy()
        ones[:, -2 * groups :] = np.ones(groups, dtype="<f2").view(np.uint8)
        levels = weight_type.decode(ones, groups * GROUP).reshape(len(raw), groups, GROUP)
        scales = raw[:, -2 * groups :].copy().view("<f2").astype(np.float32)
        return levels, scales

    # ---------------------------------------------------------------------- dots, weighted sums

    def _prepare(self, acts: Activations) -> None:
        pass  # quantised where it is used

    def _dot(self, acts, x, addresses, piece, ids, start, n, out) -> None:
        self._ascending(ids)
        raw = self._raw(addresses, piece, ids, start, n)
        first = 0 if ids is not None else start
        if piece.quantised:
            levels, scales = self._parts(raw, piece)
            for t in range(len(x)):
                q, x_scales = quantise(x[t])
                sums = (levels * q).sum(axis=2)  # integers below 2^24: exact
                terms = sums.astype(np.float64) * (scales * x_scales)
                out[t, first : first + n] = terms.sum(axis=1)
        else:
            rows = BY_CODE[piece.weight_type].decode(raw, piece.n_cols).astype(np.float64)
            for t in range(len(x)):
                out[t, first : first + n] = (rows * x[t]).sum(axis=1)

    def _low_bit(self, acts, x, rows, n_planes, out) -> None:
        planes = np.unpackbits(rows.reshape(len(rows), n_planes, -1), axis=2, bitorder="little")
        groups = -(-x.shape[1] // GROUP)
        codes = (planes.astype(np.int64) << np.arange(n_planes)[:, None]).sum(axis=1)
        levels = 2 * codes[:, : groups * GROUP] - 2**n_planes + 1
        q, scales = quantise(x[0])
        sums = (levels.reshape(len(rows), groups, GROUP) * q).sum(axis=2)
        out[:] = (sums * scales.astype(np.float64)).sum(axis=1)

    def _accumulate(self, coef, addresses, piece, ids, start, n, y) -> None:
        self._ascending(ids)
        raw = self._raw(addresses, piece, ids, start, n)
        if piece.quantised:
            levels, scales = self._parts(raw, piece)
        else:
            levels, scales = BY_CODE[piece.weight_type].decode(raw, piece.n_cols), None
        for t in range(len(coef)):
            total = y[t, : piece.n_cols].copy()
            for k in range(n):
                if scales is None:
                    total += coef[t, k] * levels[k]
                else:
                    row = (coef[t, k] * scales[k])[:, None] * levels[k]
                    total += row.reshape(-1)[: piece.n_cols]
            y[t, : piece.n_cols] = total + np.float32(0)

    def _decode_rows(self, addresses, piece, ids, out) -> None:
        raw = self._raw(addresses, piece, ids, 0, len(ids))
        out[:] = BY_CODE[piece.weight_type].decode(raw, piece.n_cols)

    # ------------------------------------------------------------------------- norms, elementwise

    def _rms_norm(self, x, weight, eps, out) -> None:
        squares = np.square(x.astype(np.float64)).mean(axis=1, keepdims=True)
        out[:] = x / np.sqrt(squares + eps) * weight

    def _layer_norm(self, x, weight, bias, eps, out) -> None:
        centred = x - x.astype(np.float64).mean(axis=1, keepdims=True)
        squares = np.square(centred).mean(axis=1, keepdims=True)
        out[:] = centred / np.sqrt(squares + eps) * weight + bias

    def _rope(self, x, cosines, sines) -> None:
        half = cosines.shape[1]
        a, b = x[:, :, :half].copy(), x[:, :, half : 2 * half].copy()
        c, s = cosines[:, None, :], sines[:, None, :]
        x[:, :, :half] = a * c - b * s
        x[:, :, half : 2 * half] = b * c + a * s

    def _activate(self, kind, pre, up, out) -> None:
        x = pre.astype(np.float64)
        with np.errstate(over="ignore"):  # exp(-x) may be infinite: the quotient is then 0
            if kind == "silu":
                value = x / (1 + np.exp(-x))
            elif kind == "gelu_tanh":
                u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
                value = x / (1 + np.exp(-2 * u))
            elif kind == "gelu":
                erf = np.vectorize(math.erf, otypes=[np.float64])
                value = 0.5 * x * (1 + erf(x / math.sqrt(2)))
            elif kind == "sigmoid":
                value = sigmoid(x)
            elif kind == "tanh":
                value = np.tanh(x)
            else:
                value = np.where(x <= 0, 0, x)
                value = value * value if kind == "relu2" else value
        out[:] = value if up is None else value * up

    def _active_ids(self, pre, out) -> int:
        found = np.flatnonzero((pre > 0).any(axis=0))
        out[: len(found)] = found
        return len(found)

    # ---------------------------------------------------------------------------------- attention

    def _attention(self, q, k, v, first_position, window, scale, cap, out) -> None:
        n_tokens, n_heads, head_dim = q.shape
        shared = n_heads // k.shape[0]
        for t in range(n_tokens):
            stop = first_position + t + 1
            start = max(0, stop - window) if window else 0
            for h in range(n_heads):
                keys = k[h // shared, start:stop].astype(np.float64)
                values = v[h // shared, start:stop].astype(np.float64)
                scores = (keys * q[t, h]).sum(axis=1) * scale
                scores = cap * np.tanh(scores / cap) if cap else scores
                weights = np.exp(scores - scores.max())
                mixed = (weights[:, None] * values).sum(axis=0) / weights.sum()
                out[t, h * head_dim : (h + 1) * head_dim] = mixed
