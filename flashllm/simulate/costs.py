"""What misses cost on a device: reads as the planner would merge them, bytes, seconds.

All tokens of a layer go through `coalesce` at once, each in an address range of its own, so that
nothing merges across tokens and a thousand tokens are one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import UsageError
from ..offload.frames import MAX_PIECES
from ..offload.pick import MAX_EXTENT
from ..offload.planner import Curve, coalesce, worthwhile_gap
from .replay import Misses


class SimulationCurve(Curve, Protocol):
    """A planner's curve that also answers for many batches at once (probe.curve.DeviceCurve)."""

    name: str

    def seconds_each(self, n_ops: np.ndarray, bytes_each: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Cost:
    """Sums over all tokens of a layer."""

    n_ops: int
    n_bytes: int
    seconds: float


def cost(misses: Misses, curve: SimulationCurve, *, frame_bytes: int, gap_limit: int) -> Cost:
    """Reads of the misses on a device; gaps are read through where that is cheaper (at most
    `gap_limit` bytes); a token's reads of a layer are one batch, and layers follow each other."""
    if not len(misses):
        return Cost(0, 0, 0.0)
    # The address ranges of two tokens lie further apart than any gap.
    far = (int(misses.frame.max()) + 1) * frame_bytes + gap_limit + 1
    if far * (int(misses.token.max()) + 1) >= 2**63:
        raise UsageError(f"a simulation of {int(misses.token.max()) + 1} tokens and a layer of "
                         f"{far} bytes is too large")
    offsets = misses.token.astype(np.int64) * far + misses.frame.astype(np.int64) * frame_bytes
    extents = coalesce(
        misses.frame,
        offsets,
        np.full(len(offsets), frame_bytes, np.int64),
        max_gap=worthwhile_gap(curve, bytes_each=frame_bytes, limit=gap_limit),
        max_extent=max(MAX_EXTENT, frame_bytes),
        max_frames=MAX_PIECES,
    )
    token = extents.offset // far
    n_ops = np.bincount(token)
    n_bytes = np.bincount(token, weights=extents.length)
    busy = n_ops > 0
    seconds = curve.seconds_each(n_ops[busy], n_bytes[busy] / n_ops[busy])
    return Cost(len(extents), extents.n_bytes, float(seconds.sum()))
