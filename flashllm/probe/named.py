"""Curves of kinds of devices, for asking what a device that is not here would do.

Assumptions, not measurements: each is one operation's cost plus its bytes at the sequential rate,
from round figures of specifications and data sheets.  Probe the real device where there is one.

- `ufs4`: UFS 4.0 of a phone. 4.0 GB/s sequential (4.2 in data sheets); 100 us alone; 100,000
  operations/s with many in flight, below data sheets, which assume a range that fits its cache.
- `nvme4`: an NVMe SSD on four lanes of PCIe 4. 7 GB/s; 80 us alone; 190,000 operations/s at 16 in
  flight, which is that latency 16 times over.
- `emmc`: eMMC 5.1. 300 MB/s of the bus's 400; 5,000 alone, 10,000 operations/s with its command
  queue.
- `sd`: an SD card of application class A2. 90 MB/s of UHS-I's 104; 4,000 operations/s is what A2
  promises with a queue, 1,500 what A1 promises without.
"""

from __future__ import annotations

from ..registry import Registry
from ..units import KIB, MIB
from .curve import DEFAULT_CURVE, DeviceCurve, Point

_SIZES = (512, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB)


def affine(name: str, *, ops_alone: float, ops_deep: float, bytes_per_s: float) -> DeviceCurve:
    """A curve of operations/s for small reads, one by one and at most, and a sequential rate."""
    return DeviceCurve(
        name,
        tuple(
            Point(depth, size, 1 / min(depth * ops_alone, ops_deep) + size / bytes_per_s)
            for depth in (1, 2, 4, 8, 16)
            for size in _SIZES
        ),
    )


CURVES: Registry[DeviceCurve] = Registry(
    "device curve",
    {
        curve.name: curve
        for curve in (
            DEFAULT_CURVE,
            affine("ufs4", ops_alone=10_000, ops_deep=100_000, bytes_per_s=4.0e9),
            affine("nvme4", ops_alone=12_500, ops_deep=190_000, bytes_per_s=7.0e9),
            affine("emmc", ops_alone=5_000, ops_deep=10_000, bytes_per_s=300e6),
            affine("sd", ops_alone=1_500, ops_deep=4_000, bytes_per_s=90e6),
        )
    },
)
