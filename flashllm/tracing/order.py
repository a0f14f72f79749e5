"""An order of a layer's bundles in which those that fire together lie together.

Pure: bits in, a permutation out.  The aim is that a token touches few frames.  A frame is filled
greedily: it begins with the hottest bundle left, and takes the bundle that shares the most tokens
with the frame's, so that reading the frame for those is no new read, less `COLD` of the tokens for
which only the newcomer would be read.  Frames then follow each other as a chain in the same sense,
so that neighbouring reads merge.  Bundles that never fired come last, as they lay.
"""

from __future__ import annotations

import numpy as np

# Weight of tokens that would touch the frame only for the newcomer; measured in traces/README.md.
COLD = 0.1


def order_for(bits: np.ndarray, *, per_frame: int) -> np.ndarray:
    """int64[n_bundles]: which bundle lies at each place, from bool [tokens, n_bundles]."""
    fired = np.count_nonzero(bits, axis=0)
    alive = np.flatnonzero(fired)
    columns = np.ascontiguousarray(bits[:, alive])
    groups = _fill(columns, per_frame)
    unions = np.empty((len(bits), len(groups)), bool)
    for g, group in enumerate(groups):
        unions[:, g] = columns[:, group].any(axis=1)
    chain = [alive[groups[int(at[0])]] for at in _fill(unions, 1, follow=True)]
    return np.concatenate([*chain, np.flatnonzero(fired == 0)]).astype(np.int64)


def _fill(bits: np.ndarray, size: int, *, follow: bool = False) -> list[np.ndarray]:
    """Groups of `size` columns of bool [tokens, n]; with `follow`, a group's first column is chosen
    by the group before it instead of by weight.

    `shared` counts, for every column, its tokens among the group's; a newcomer adds only the rows
    of tokens that are new to the group.
    """
    n = bits.shape[1]
    weight = np.count_nonzero(bits, axis=0).astype(np.float32)
    if size == 1 and not follow:
        return [np.array([i]) for i in np.argsort(-weight, kind="stable")]
    counted = bits.view(np.uint8)
    left, groups = np.ones(n, bool), []
    shared, union = np.zeros(n, np.float32), np.zeros(len(bits), bool)
    for _ in range(-(-n // size)):
        group: list[int] = []
        while len(group) < size and len(groups) * size + len(group) < n:
            score = weight
            if group or (follow and groups):
                score = shared - COLD * (weight - shared)
            best = int(np.argmax(np.where(left, score, -np.inf)))
            if not group:
                shared, union = np.zeros(n, np.float32), np.zeros(len(bits), bool)
            new = np.flatnonzero(bits[:, best] & ~union)
            for at in range(0, len(new), 255):  # bytes add up to 255, sixteen times as fast
                shared += counted[new[at : at + 255]].sum(axis=0, dtype=np.uint8)
            union[new] = True
            left[best] = False
            group.append(best)
        groups.append(np.array(group))
    return groups
