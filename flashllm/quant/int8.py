"""int8: groups of 32 columns, value = q * scale, q in [-127, 127], scale f16.

Row layout, n_pad = n rounded up to 32: n_pad int8 values, then n_pad / 32 f16 scales.
The scale is max|x| / 127 rounded *up* to f16, so that nothing is clipped and the error is at most
half a scale.  A group of zeros has scale 0.
"""

from __future__ import annotations

import numpy as np

from .base import GROUP, WeightType, grouped, n_groups

MAX_F16 = 65504.0


def f16_at_least(values: np.ndarray) -> np.ndarray:
    """The smallest f16 that is not below each non-negative float32 value (<= 65504)."""
    halves = values.astype(np.float16)
    below = halves.astype(np.float32) < values
    # Neighbouring non-negative halves are neighbouring integers.
    return (halves.view(np.uint16) + below.astype(np.uint16)).view(np.float16)


class Int8(WeightType):
    """Symmetric 8-bit groups of 32."""

    name, code, group_size = "int8", 3, GROUP

    def row_bytes(self, n_cols: int) -> int:
        return n_groups(n_cols) * (GROUP + 2)

    def _scales(self, rows: np.ndarray) -> np.ndarray:
        """float16 [r, groups]."""
        self._refuse(rows, np.abs(rows) > MAX_F16 * 127, "needs a scale beyond 65504")
        return f16_at_least(np.abs(grouped(rows)).max(axis=2) / np.float32(127))

    def _encode(self, rows: np.ndarray) -> np.ndarray:
        scales = self._scales(rows)
        divisor = np.where(scales == 0, np.float32(1), scales.astype(np.float32))
        q = np.rint(grouped(rows) / divisor[:, :, None])
        r, groups = scales.shape
        raw = np.empty((r, self.row_bytes(rows.shape[1])), dtype=np.uint8)
        raw[:, : groups * GROUP] = q.astype(np.int8).reshape(r, groups * GROUP).view(np.uint8)
        raw[:, groups * GROUP :] = scales.astype("<f2").view(np.uint8)
        return raw

    def _decode(self, raw: np.ndarray, n_cols: int) -> np.ndarray:
        r, groups = raw.shape[0], n_groups(n_cols)
        q = raw[:, : groups * GROUP].view(np.int8).astype(np.float32).reshape(r, groups, GROUP)
        scales = np.ascontiguousarray(raw[:, groups * GROUP :]).view("<f2").astype(np.float32)
        return (q * scales[:, :, None]).reshape(r, groups * GROUP)[:, :n_cols].copy()

    def error_bound(self, rows: np.ndarray) -> np.ndarray:
        # Half a step, and a little for the rounding of x / scale and of q * scale.
        half = self._scales(rows).astype(np.float32) * np.float32(0.5 + 127 * 2.0**-22)
        return np.repeat(half, GROUP, axis=1)[:, : rows.shape[1]]
