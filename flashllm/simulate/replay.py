"""One layer's tokens through one cache: which frames miss.

`replay` follows offload/pick.py rule by rule, one step per token: hits are pinned, victims make
room among the rest, misses that find no slot pass through, the most recently used first in line
for the slots there are.  tests/test_simulate.py holds it to a Segment driven by those rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..cache import Policy
from ..offload.taking import most_recent


@dataclass(frozen=True, eq=False)
class Uses:
    """Frames wanted: frames[first[t]:first[t+1]] by token t, distinct and ascending; `n_active`
    active bundles lie in each; `ahead`: a predictor asks for it before the truth is known."""

    first: np.ndarray
    frames: np.ndarray
    n_active: np.ndarray
    ahead: np.ndarray
    n_frames: int

    @property
    def n_tokens(self) -> int:
        return len(self.first) - 1

    def steps(self) -> list[np.ndarray]:
        return np.split(self.frames, self.first[1:-1])


@dataclass(frozen=True, eq=False)
class Misses:
    """Frames missed, in the order of tokens: `token`, `frame`, `n_active` and `ahead` of each,
    frames ascending within a token."""

    token: np.ndarray
    frame: np.ndarray
    n_active: np.ndarray
    ahead: np.ndarray

    def __len__(self) -> int:
        return len(self.frame)

    def where(self, some: np.ndarray) -> Misses:
        """Those of a mask."""
        return Misses(self.token[some], self.frame[some], self.n_active[some], self.ahead[some])


def frames_used(
    first: np.ndarray, ids: np.ndarray, *, n_bundles: int, per_frame: int, unit: int = 1,
    order: np.ndarray | None = None, asked: tuple[np.ndarray, np.ndarray] | None = None,
) -> Uses:  # fmt: skip
    """Frames of `per_frame` bundles that each token wants; first and ids as Trace.active gives.

    unit   bundles that are predicted together, neighbours in the file: one active, all wanted
    order  which bundle lies at each place of the file; None: bundle b at place b
    asked  bundles that a predictor asks for ahead, as first and ids are: wanted too
    """
    n_frames, place_of = -(-n_bundles // per_frame), np.arange(n_bundles)
    if order is not None:
        place_of[order] = np.arange(n_bundles)

    def keys(first: np.ndarray, ids: np.ndarray, unit: int) -> np.ndarray:
        """token * n_frames + frame of all, the members of their units among them."""
        token = np.repeat(np.arange(len(first) - 1, dtype=np.int64), np.diff(first))
        place = place_of[ids]
        if per_frame % unit:  # a unit reaches beyond the frame of its bundle
            members = (place // unit * unit)[:, None] + np.arange(unit)
            place, token = np.minimum(members, n_bundles - 1), token[:, None]
        return (token * n_frames + place // per_frame).ravel()

    active, counts = np.unique(keys(first, ids, 1), return_counts=True)
    every, ahead = active, np.zeros(0, np.int64)
    if per_frame % unit:
        every = np.unique(keys(first, ids, unit))
    if asked is not None:
        ahead = np.unique(keys(*asked, unit))
        every = np.union1d(every, ahead)
    n_active = np.zeros(len(every), np.int64)
    n_active[np.searchsorted(every, active)] = counts
    early = np.zeros(len(every), bool)
    early[np.searchsorted(every, ahead)] = True
    per_token = np.bincount(every // n_frames, minlength=len(first) - 1)
    return Uses(
        np.concatenate(([0], np.cumsum(per_token))), (every % n_frames).astype(np.int32),
        n_active, early, n_frames,
    )  # fmt: skip


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
    return Misses(token, uses.frames[at], uses.n_active[at], uses.ahead[at])
