"""DeviceCurve: what a read costs on one device, by its size and by how many are in flight.

A planner trades wasted bytes against operations with it.  Measured by device.probe_device, or given
as a JSON file, or the stated default; the curve carries which.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import FormatError, UsageError
from ..regular import read_small

MAX_CURVE_BYTES = 2**18  # a thousand points


@dataclass(frozen=True, order=True)
class Point:
    """`depth` reads of `size_bytes` in flight take `seconds_per_read` each: elapsed over count."""

    depth: int
    size_bytes: int
    seconds_per_read: float

    def __post_init__(self):
        for name in ("depth", "size_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**40:
                raise UsageError(f"{name} of a curve's point is a positive integer, not {value!r}")
        s = self.seconds_per_read
        if isinstance(s, bool) or not isinstance(s, int | float) or not 0 < s < math.inf:
            raise UsageError(f"seconds_per_read of a curve's point is positive, not {s!r}")


@dataclass(frozen=True)
class DeviceCurve:
    """Points sorted by depth and size; between sizes the cost of a read is linear in its bytes,
    below the smallest it is constant, above the largest the last rate goes on.

    A probe's noise only ever adds time, and one stalled point must not turn decisions round.  So
    no read is taken to cost more than a larger one at the same depth, nor than the same read with
    fewer in flight.
    """

    name: str
    points: tuple[Point, ...]

    def __post_init__(self):
        if not self.points:
            raise UsageError("a device curve needs at least one point")
        keys = [(p.depth, p.size_bytes) for p in self.points]
        if keys != sorted(set(keys)):
            raise UsageError("a curve's points are sorted by depth and size, none twice")

    @cached_property
    def _tables(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Depth, ascending -> sizes, and seconds per read of those, of no larger read more."""
        tables = {}
        for depth in sorted({p.depth for p in self.points}):
            points = [p for p in self.points if p.depth == depth]
            costs = np.minimum.accumulate([p.seconds_per_read for p in reversed(points)])[::-1]
            tables[depth] = np.array([p.size_bytes for p in points], float), costs
        return tables

    @property
    def depths(self) -> list[int]:
        return list(self._tables)

    def seconds_per_read(self, bytes_each: float, *, depth: int = 16) -> float:
        """Elapsed seconds per read with `depth` in flight, from the nearest measured depth that is
        not above it (the lowest when all are)."""
        known = [d for d in self.depths if d <= depth] or self.depths[:1]
        return float(self._per_read(np.asarray([bytes_each], float), known[-1])[0])

    def _per_read(self, bytes_each: np.ndarray, depth: int) -> np.ndarray:
        """Seconds per read at one of the measured depths, by the least of the lower ones' too."""
        found = np.full(np.shape(bytes_each), np.inf)
        for known, (sizes, costs) in self._tables.items():
            if known > depth:
                break
            beyond = np.maximum(bytes_each / sizes[-1], 1.0)
            found = np.minimum(found, np.interp(bytes_each, sizes, costs) * beyond)
        return found

    def seconds(self, n_ops: float, bytes_each: float, *, depth: int = 16) -> float:
        """Elapsed seconds of `n_ops` reads of `bytes_each`, at most `depth` in flight.

        Never less than one read takes alone.
        """
        if n_ops <= 0:
            return 0.0
        alone = self.seconds_per_read(bytes_each, depth=1)
        return max(n_ops * self.seconds_per_read(bytes_each, depth=min(depth, n_ops)), alone)

    def seconds_each(
        self, n_ops: np.ndarray, bytes_each: np.ndarray, *, depth: int = 16
    ) -> np.ndarray:
        """`seconds` of many batches at once; arrays of one shape."""
        n_ops, bytes_each = np.asarray(n_ops, float), np.asarray(bytes_each, float)
        depths = self.depths
        alone = self._per_read(bytes_each, max([d for d in depths if d <= 1] or depths[:1]))
        each = self._per_read(bytes_each, depths[0])
        for known in depths[1:]:
            deep = np.minimum(depth, n_ops) >= known
            each[deep] = self._per_read(bytes_each[deep], known)
        return np.where(n_ops > 0, np.maximum(n_ops * each, alone), 0.0)

    def bytes_per_s(self, bytes_each: float, *, depth: int = 16) -> float:
        return bytes_each / self.seconds_per_read(bytes_each, depth=depth)

    @cached_property
    def sequential_bytes_per_s(self) -> float:
        """The best rate among the points: large reads, many in flight."""
        return max(p.size_bytes / p.seconds_per_read for p in self.points)

    def save(self, path: str | os.PathLike) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> DeviceCurve:
        """Raises FormatError for a file that is not a curve, FlashReadError when unreadable."""
        text = read_small(path, MAX_CURVE_BYTES)
        try:
            raw = json.loads(text)
            points = tuple(sorted(Point(**point) for point in raw["points"]))
            if set(raw) != {"name", "points"} or not isinstance(raw["name"], str):
                raise UsageError(f"a curve has a name and points, not {sorted(raw)}")
            return cls(raw["name"], points)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FormatError(path, "device curve", "name and points", error) from error


def best_curve(curves: Sequence[DeviceCurve]) -> DeviceCurve:
    """Of several probes of one device the least cost of each point: what it can do."""
    found: dict[tuple[int, int], Point] = {}
    for point in (point for curve in curves for point in curve.points):
        key = (point.depth, point.size_bytes)
        found[key] = min(found.get(key, point), point, key=lambda p: p.seconds_per_read)
    name = f"{curves[0].name}, best of {len(curves)}"
    return DeviceCurve(name, tuple(found[key] for key in sorted(found)))


def _from_rates(name: str, rates: dict[int, dict[int, float]]) -> DeviceCurve:
    """A curve from MB/s by depth and size in KiB."""
    return DeviceCurve(
        name,
        tuple(
            Point(depth, kib * 1024, kib * 1024 / (mb_per_s * 1e6))
            for depth, by_size in rates.items()
            for kib, mb_per_s in by_size.items()
        ),
    )


# A virtual disk on a good SSD: what is assumed when nothing could be measured.
DEFAULT_CURVE = _from_rates(
    "default",
    {
        1: {4: 35, 16: 145, 64: 430, 256: 730, 1024: 1200},
        16: {4: 127, 16: 345, 64: 1000, 256: 1500, 1024: 1700},
    },
)
