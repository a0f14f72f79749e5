"""One layer's tokens through one cache: which frames miss.

`replay` follows offload/pick.py rule by rule, one step per token: hits are pinned, victims make
room among the rest, misses that find no slot pass through, the most recently used first in line
for the slots there are.  tests/test_simulate.py holds it to a Segment driven by those rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..cache import Policy
from ..offload.pick import most_recent


@dataclass(frozen=True, eq=False)
class Uses:
    """Frames wanted: frames[first[t]:first[t+1]] by token t, distinct and ascending; `n_active`
    active bundles lie in each."""

    first: np.ndarray
    frames: np.ndarray
    n_active: np.ndarray
    n_frames: int

    @property
    def n_tokens(self) -> int:
        return len(self.first) - 1

    def steps(self) -> list[np.ndarray]:
        return np.split(self.frames, self.first[1:-1])


@dataclass(frozen=True, eq=False)
class Misses:
    """Frames missed, in the order of tokens: `token`, `frame` and `n_active` of each, frames
    ascending within a token."""

    token: np.ndarray
    frame: np.ndarray
    n_active: np.ndarray

    def __len__(self) -> int:
        return len(self.frame)


def frames_used(
    first: np.ndarray, ids: np.ndarray, *, n_bundles: int, per_frame: int, unit: int = 1,
    order: np.ndarray | None = None,
) -> Uses:  # fmt: skip
    """Frames of `per_frame` bundles that each token wants; first and ids as Trace.active gives.

    unit   bundles that are predicted together, neighbours in the file: one active, all wanted
    order  which bundle lies at each place of the file; None: bundle b at place b
    """
    place = ids
    if order is not None:
        inverse = np.empty(n_bundles, np.int64)
        inverse[order] = np.arange(n_bundles)
        place = inverse[ids]
    n_frames = -(-n_bundles // per_frame)
    token = np.repeat(np.arange(len(first) - 1, dtype=np.int64), np.diff(first))
    active = token * n_frames + place // per_frame
    keys, n_active = np.unique(active, return_counts=True)
    if per_frame % unit:  # a unit reaches beyond the frame of its active bundle
        members = (place // unit * unit)[:, None] + np.arange(unit)
        wanted = token[:, None] * n_frames + np.minimum(members, n_bundles - 1) // per_frame
        every = np.unique(wanted)
        n_active = np.zeros(len(every), np.int64)
        np.add.at(n_active, np.searchsorted(every, active), 1)
        keys = every
    counts = np.bincount(keys // n_frames, minlength=len(first) - 1)
    first = np.concatenate(([0], np.cumsum(counts)))
    return Uses(first, (keys % n_frames).astype(np.int32), n_active, n_frames)


def replay(uses: Uses, policy: Policy) -> Misses:
    """Misses of a cache of policy.n_slots slots that starts empty."""
    n_slots, n_used = policy.n_slots, 0
    frame_slot = np.full(uses.n_frames, -1, np.int32)
    slot_frame = np.full(n_slots, -1, np.int32)
    last_use = np.full(uses.n_frames, -1, np.int64)
    missed: list[np.ndarray] = []
    for clock, wanted in enumerate(uses.steps()):
        slots = frame_slot[wanted]
        hit = slots >= 0
        hits, missing = slots[hit], wanted[~hit]
        missed.append(uses.first[clock] + np.flatnonzero(~hit))
        policy.observe(hits, clock)
        n_evict = min(max(0, len(missing) - (n_slots - n_used)), n_used - len(hits))
        if n_evict:
            barred = slot_frame < 0
            barred[hits] = True
            victims = policy.victims(n_evict, barred)
            frame_slot[slot_frame[victims]] = -1
            slot_frame[victims] = -1
            n_used -= n_evict
        n_placed = min(len(missing), n_slots - n_used)
        if n_placed:
            chosen = missing
            if n_placed < len(missing):
                chosen = missing[most_recent(last_use[missing], n_placed)]
            placed = np.flatnonzero(slot_frame < 0)[:n_placed].astype(np.int32)
            slot_frame[placed], frame_slot[chosen] = chosen, placed
            n_used += n_placed
            policy.admit(placed, chosen, clock)
        last_use[wanted] = clock
    token = np.repeat(np.arange(uses.n_tokens), [len(m) for m in missed])
    at = np.concatenate(missed)
    return Misses(token, uses.frames[at], uses.n_active[at])
