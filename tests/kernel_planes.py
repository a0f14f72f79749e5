"""Planes in memory for kernel tests: frames scattered over buffers, rows with neighbours."""

from __future__ import annotations

import numpy as np

from flashllm.kernels import PieceView, kernel_troubles
from flashllm.quant import WEIGHT_TYPES
from flashllm.units import align_up

AVAILABLE = [name for name, why in kernel_troubles().items() if why is None]
NATIVE = [name for name in AVAILABLE if name != "reference"]
TYPES = WEIGHT_TYPES.names()


class MemoryPlane:
    """Items of one weight type in frames of their own, `addresses` into them.

    Around each piece lies a byte pattern that decodes to huge values or NaN, so that a kernel that
    reads past a row's end shows.
    """

    def __init__(self, rows, weight_type, *, per_frame=4, lead=32, tail=16, seed=0, skip=()):
        kind = WEIGHT_TYPES[weight_type]
        raw = kind.encode(rows)
        n_items, n_cols = rows.shape
        stride = align_up(lead + raw.shape[1] + tail, 16)
        self.piece = PieceView(kind.code, per_frame, stride, lead, n_cols)
        self.rows = kind.decode(raw, n_cols)
        n_frames = -(-n_items // per_frame)
        self.addresses = np.zeros(n_frames, dtype=np.uint64)
        self._buffers = []
        order = np.random.default_rng(seed).permutation(n_frames)
        for frame in order:
            if frame in skip:
                continue
            buffer = np.full(per_frame * stride + 64, 0xFF, dtype=np.uint8)
            start = -buffer.ctypes.data % 32 + 16  # 16-aligned and never more
            for within in range(per_frame):
                item = frame * per_frame + within
                if item < n_items:
                    at = start + within * stride + lead
                    buffer[at : at + raw.shape[1]] = raw[item]
            self.addresses[frame] = buffer.ctypes.data + start
            self._buffers.append(buffer)


def normal(shape, seed=0, scale=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return np.ascontiguousarray(values, dtype=np.float32)


def same_bits(a, b):
    """Equal as bytes: 0.0 is not -0.0 and a NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
