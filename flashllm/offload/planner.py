"""Which reads bring which frames: pure decisions over arrays.

Knows file offsets, lengths and a device curve; no files, slots or threads.  Small random reads are
limited by operations, not bytes, so neighbouring frames are merged, gaps are read through when
that is cheaper than another operation, and a plane is swept when sweeping costs less than picking.
Every knob is a required keyword: the caller owns the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


class Curve(Protocol):
    """What the planner asks of a device curve."""

    sequential_bytes_per_s: float

    def seconds(self, n_ops: int, bytes_each: float) -> float:
        """Time of `n_ops` random reads of `bytes_each`, many in flight."""


@dataclass(frozen=True, slots=True)
class Extents:
    """Reads in file order, and the wanted frames that lie in each.

    frames  int32[m]    wanted frames, ascending
    first   int32[n+1]  extent e holds frames[first[e]:first[e+1]]
    offset  int64[n]    file offset; length int64[n] bytes, gaps included
    """

    frames: np.ndarray
    first: np.ndarray
    offset: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def n_bytes(self) -> int:
        return int(self.length.sum())

    def frame_at(self, extent: int, nth: int) -> int:
        """The nth of the wanted frames in an extent."""
        return int(self.frames[int(self.first[extent]) + nth])

    def part(self, start: int, stop: int) -> Extents:
        """Extents [start, stop) alone."""
        a, b = int(self.first[start]), int(self.first[stop])
        return Extents(
            self.frames[a:b],
            self.first[start : stop + 1] - np.int32(a),
            self.offset[start:stop],
            self.length[start:stop],
        )


@dataclass(slots=True)
class Part:
    """Extents [start, stop) of some, without arrays of its own."""

    extents: Extents
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def n_bytes(self) -> int:
        return int(self.extents.length[self.start : self.stop].sum())

    def frame_at(self, extent: int, nth: int) -> int:
        """As Extents.frame_at."""
        return self.extents.frame_at(self.start + extent, nth)


def coalesce(
    frames: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    *,
    max_gap: int,
    max_extent: int,
    max_frames: int,
) -> Extents:
    """Merge wanted frames into extents.

    frames   int32[m] ascending; offsets, lengths int64[m] their places in the file, ascending and
             without overlap
    max_gap     unwanted bytes between two frames that are rather read than skipped
    max_extent  most bytes of one extent (a single longer frame is an extent of its own)
    max_frames  most wanted frames in one extent (a read scatters over at most 1024 pieces)
    """
    m = len(frames)
    if m == 0:
        none = np.empty(0, dtype=np.int64)
        return Extents(frames, np.zeros(1, dtype=np.int32), none, none)
    ends = offsets + lengths
    breaks = np.flatnonzero(offsets[1:] - ends[:-1] > max_gap) + 1
    first = np.concatenate(([0], breaks, [m]))
    too_long = (ends[first[1:] - 1] - offsets[first[:-1]] > max_extent) | (
        np.diff(first) > max_frames
    )
    if too_long.any():
        cuts = [first[:-1][~too_long]]
        for run in np.flatnonzero(too_long):
            cuts.append(_cut_run(offsets, ends, first[run], first[run + 1], max_extent, max_frames))
        first = np.append(np.sort(np.concatenate(cuts)), m)
    offset = offsets[first[:-1]]
    return Extents(frames, first.astype(np.int32), offset, ends[first[1:] - 1] - offset)


def _cut_run(offsets, ends, start: int, stop: int, max_extent: int, max_frames: int) -> list[int]:
    """First frames of the longest extents that fit, from the run's start (one loop per extent)."""
    cuts = []
    while start < stop:
        cuts.append(start)
        fits = int(np.searchsorted(ends[start:stop], offsets[start] + max_extent, side="right"))
        start += max(1, min(fits, max_frames))
    return cuts


@dataclass(frozen=True, eq=False, slots=True)
class SweepPlan:
    """How a plane's absent frames stream by, in file order.  Compared by identity: a new set of
    resident frames is a new plan.

    cuts   int32[n, 2]  chunk c reads the frames [cuts[c,0], cuts[c,1]) that `read` marks
    cover  int32[n+1]   frames [0, cover[0]) need no chunk; once chunk c is there, so are all frames
                        of [cover[c], cover[c+1])
    read   bool[n_frames], or None when every frame of each chunk is read
    runs   int64[n, 4]: chunk c is the run of frames [runs[c,0], runs[c,1]), one extent at offset
           runs[c,2] of runs[c,3] bytes; None where frames do not lie one after the other or are
           coded
    n_bytes, absent_bytes  of the file: what is read; what of it was absent (the rest are gaps)
    """

    cuts: np.ndarray
    cover: np.ndarray
    read: np.ndarray | None
    runs: np.ndarray | None
    n_bytes: int
    absent_bytes: int
    owner: object = None

    def __len__(self) -> int:
        return len(self.cuts)

    def frames(self, chunk: int) -> np.ndarray:
        """int32 frames that chunk `chunk` reads."""
        start, stop = self.cuts[chunk]
        frames = np.arange(start, stop, dtype=np.int32)
        return frames if self.read is None else frames[self.read[start:stop]]


def plan_sweep(
    absent: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    *,
    stage_bytes: int,
    decoded_bytes: int,
    decoded_stage_bytes: int,
    max_gap: int,
    owner: object = None,
) -> SweepPlan:
    """Cut a plane's absent frames into chunks of at most one stage.

    absent         bool[n_frames]; offsets, lengths int64[n_frames] in the file
    stage_bytes    room in a stage for what is read
    decoded_bytes  room that a decoded frame takes in the stage's second area, which has
                   `decoded_stage_bytes`; 0 when frames are consumed as read
    max_gap        bytes of present frames between absent ones that are rather read again
    """
    n_frames = len(absent)
    wanted = np.flatnonzero(absent)
    if len(wanted) == 0:
        none = np.empty((0, 2), dtype=np.int32)
        cover = np.array([n_frames], dtype=np.int32)
        runs = None if decoded_bytes else np.empty((0, 4), dtype=np.int64)
        return SweepPlan(none, cover, None, runs, 0, 0, owner)
    ends = offsets + lengths
    gaps = offsets[wanted[1:]] - ends[wanted[:-1]]
    read = absent.copy()
    for at in np.flatnonzero((gaps > 0) & (gaps <= max_gap)):
        read[wanted[at] + 1 : wanted[at + 1]] = True
    frames = np.flatnonzero(read)
    sizes = np.cumsum(lengths[frames])
    most = decoded_stage_bytes // decoded_bytes if decoded_bytes else len(frames)
    cuts, at, before = [], 0, 0
    while at < len(frames):
        fits = int(np.searchsorted(sizes, before + stage_bytes, side="right")) - at
        stop = at + min(fits, most)
        if stop <= at:
            raise AssertionError(
                f"a frame of {int(lengths[frames[at]])} stored and {decoded_bytes} decoded bytes "
                f"does not fit a stage of {stage_bytes} and {decoded_stage_bytes}"
            )
        cuts.append((frames[at], frames[stop - 1] + 1))
        at, before = stop, int(sizes[stop - 1])
    cuts = np.array(cuts, dtype=np.int32)
    dense = bool((np.diff(cuts, axis=1).sum()) == len(frames))
    cover = np.append(cuts[:, 0], n_frames).astype(np.int32)
    broken = np.append(offsets[1:] != ends[:-1], True)  # what follows does not follow in the file
    before = np.cumsum(broken) - broken
    runs = None
    if dense and not decoded_bytes and (before[cuts[:, 1] - 1] == before[cuts[:, 0]]).all():
        starts = offsets[cuts[:, 0]]
        runs = np.column_stack((cuts, starts, ends[cuts[:, 1] - 1] - starts)).astype(np.int64)
    return SweepPlan(
        cuts,
        cover,
        None if dense else read,
        runs,
        int(sizes[-1]),
        int(lengths[wanted].sum()),
        owner,
    )


def pick_seconds(extents: Extents, curve: Curve) -> float:
    """Time of reading these extents as random reads with many in flight."""
    n = len(extents)
    return curve.seconds(n, extents.n_bytes / n) if n else 0.0


def sweep_seconds(n_bytes: int, curve: Curve) -> float:
    """Time of streaming `n_bytes` in long sequential reads."""
    return n_bytes / curve.sequential_bytes_per_s


def worthwhile_gap(curve: Curve, *, bytes_each: int, limit: int) -> int:
    """Gap in bytes up to which reading on is cheaper than another operation of `bytes_each`.

    An operation costs its share of time beyond what its bytes take sequentially.
    """
    n = 256
    each = curve.seconds(n, bytes_each) / n
    extra = each * curve.sequential_bytes_per_s - bytes_each
    return int(min(max(extra, 0), limit))


@dataclass(slots=True)
class Pace:
    """How long reads of one sort were waited for, beside what the curve says.

    A curve comes from a third of a second of probing, and may have been taken while somebody else
    had the disk.  What reads were truly waited for is known: picks that look dear and are not, or
    sweeps that look cheap, would otherwise make the planner sweep, which reads everything, or read
    through every gap.
    """

    n_ops: float = 0.0  # recent sums
    n_bytes: float = 0.0
    estimated_s: float = 0.0
    waited_s: float = 0.0

    def note(self, *, n_ops: int, n_bytes: int, estimated_s: float, waited_s: float) -> None:
        keep = 0.9  # of the sums: about the last ten count
        self.n_ops = keep * self.n_ops + n_ops
        self.n_bytes = keep * self.n_bytes + n_bytes
        self.estimated_s = keep * self.estimated_s + estimated_s
        self.waited_s = keep * self.waited_s + waited_s

    @property
    def ratio(self) -> float:
        """Of the curve's time; 1 until something is known."""
        return self.waited_s / self.estimated_s if self.estimated_s else 1.0


@dataclass(slots=True)
class Paces:
    """What picks and sweeps were found to take.

    Only ever in favour of reading less: a sweep that is hidden behind computing is no cheaper for
    the device, and where picks wait for other reads or for a processor, so would sweeps.
    """

    picks: Pace = field(default_factory=Pace)
    sweeps: Pace = field(default_factory=Pace)

    @property
    def sweep(self) -> float:
        """What to multiply the curve's time of a sweep by."""
        return max(self.sweeps.ratio, 1.0)

    @property
    def pick(self) -> float:
        """The same of a pick."""
        return min(self.picks.ratio, self.sweep)

    def gap(self, curve: Curve, *, bytes_each: int, limit: int) -> int:
        """The worthwhile gap: the curve's, or less where picks waited for their bytes alone."""
        known, picks = worthwhile_gap(curve, bytes_each=bytes_each, limit=limit), self.picks
        if not picks.n_ops:
            return known
        rate = curve.sequential_bytes_per_s / self.sweep
        found = (picks.waited_s * rate - picks.n_bytes) / picks.n_ops
        return int(min(known, max(found, 0.0)))


def cheaper_mode(current: str, *, pick_s: float, sweep_s: float, hysteresis: float) -> str:
    """"cached" or "sweep": the other mode only when it costs less than `hysteresis` times the
    current one."""
    if current == "sweep":
        return "cached" if pick_s < hysteresis * sweep_s else "sweep"
    return "sweep" if sweep_s < hysteresis * pick_s else "cached"


def likely_misses(wanted: np.ndarray, last_use: np.ndarray, *, n_slots: int) -> np.ndarray:
    """The frames of `wanted` that `n_slots` slots under LRU would miss.

    last_use  int32[n_frames], the clock of each frame's last use, negative = never.
    A frame is in an LRU cache exactly when fewer than `n_slots` others were used since; of those
    last used at the same clock as many as have room are taken to be there, lowest first.
    """
    if n_slots == 0:
        return wanted
    if n_slots >= len(last_use):
        return wanted[last_use[wanted] < 0]
    oldest = max(int(np.partition(last_use, -n_slots)[-n_slots]), 0)
    cached = last_use > oldest
    ties = np.flatnonzero(last_use == oldest)
    cached[ties[: n_slots - np.count_nonzero(cached)]] = True
    return wanted[~cached[wanted]]
