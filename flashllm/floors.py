"""What a step cannot be faster than on this machine, whatever the code does.

Two floors: every byte that a step touches crosses DRAM once, and every byte it read from the device
was read at the probed curve's cost.  The larger of the two is what a measured time is divided by.
The flash floor is that of the reads that were made: a plan that reads less has a lower one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import ClosedError
from .probe.curve import DeviceCurve
from .probe.dram import read_bytes_per_s


@dataclass(frozen=True)
class Touched:
    """Bytes that a step reads from memory: `fixed` (planes walked whole, recurrent state), for
    each active bundle, and for each position that attention looks back on."""

    fixed: int
    per_bundle: float
    per_position: int

    def mean(self, share: Any) -> float:
        """Of a mean step of an engine.totals.Share."""
        counters = share.counters()
        bundles = counters.get("hits", 0) + counters.get("misses", 0)
        varying = self.per_bundle * bundles + self.per_position * share.positions
        return self.fixed + varying / share.steps


class Floors:
    """The floors of one open engine; `memory` gives the arrays its weights lie in.

    The rate of DRAM is measured when it is first asked for, on those arrays, and kept.
    """

    def __init__(
        self, curve: DeviceCurve, touched: Touched, memory: Callable[[], list[np.ndarray]],
        n_threads: int,
    ):  # fmt: skip
        self.curve, self.touched = curve, touched
        self._memory, self._n_threads = memory, n_threads
        self._dram: float | None = None

    @property
    def dram_bytes_per_s(self) -> float | None:
        """None while the engine holds no memory, or when it is closed before anybody asked."""
        if self._dram is None:
            try:
                memory = self._memory()
            except ClosedError:  # a stream that ends after its engine, as at interpreter exit
                return None
            self._dram = read_bytes_per_s(memory, n_threads=self._n_threads)
        return self._dram

    def of(self, share: Any) -> dict[str, float]:
        """{"dram", "flash"}: least milliseconds of a mean step of an engine.totals.Share."""
        if not share.steps:
            return {}
        counters, floors = share.counters(), {}
        if self.dram_bytes_per_s:
            floors["dram"] = 1e3 * self.touched.mean(share) / self.dram_bytes_per_s
        reads = (counters.get("reads", 0) + counters.get("prefetch_reads", 0)) / share.steps
        n_bytes = (counters.get("bytes_read", 0) + counters.get("prefetch_bytes", 0)) / share.steps
        floors["flash"] = 1e3 * self.curve.seconds(reads, n_bytes / reads) if reads else 0.0
        return floors
