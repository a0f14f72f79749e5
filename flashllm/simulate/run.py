"""Trace x order x frame size x cache x policy -> a table of hits, bytes, operations and time.

Every layer has its own cache of the same share of its frames, as the engine's segments have; caches
live on from one context of the trace to the next.  What is wanted is what is active, as in exact
mode, or the units of neighbouring bundles in which something is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import numpy as np

from ..cache import POLICIES, Policy
from ..errors import UsageError
from ..offload.state import MAX_GAP
from ..tracing import Trace
from ..units import align_up
from .costs import SimulationCurve, cost
from .replay import Uses, frames_used, replay

FRAME_ALIGNMENT = 512


@dataclass(frozen=True)
class Row:
    """One configuration, per token over all layers.

    `hit_rate` is of frames; `useful` the share of the bytes read (on the first curve) that active
    bundles take; `above_belady` misses beyond Belady's as a share of them; `ms` is flash time per
    token by curve name, `sweep_ms` that of reading in sequence everything the cache lacks.
    """

    order: str
    unit: int
    per_frame: int
    frame_bytes: int
    cache: float
    policy: str
    hit_rate: float
    misses: int
    misses_per_token: float
    ops_per_token: float
    bytes_per_token: float
    useful: float | None
    above_belady: float | None
    ms: dict[str, float] = field(default_factory=dict)
    sweep_ms: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def simulate(
    trace: Trace,
    *,
    policies: Sequence[str],
    caches: Sequence[float],
    per_frames: Sequence[int],
    curves: Sequence[SimulationCurve],
    orders: dict[str, Sequence[np.ndarray] | None] | None = None,
    bundle_bytes: int | None = None,
    units: Sequence[int] = (1,),
) -> list[Row]:
    """A row per configuration, in the order of the arguments.

    policies      names of cache.POLICIES, some with an option (`policy_of`); with "belady" among
                  them distances from it are known
    caches        shares of each layer's frames that are cached, above 0 and at most 1
    per_frames    bundles per frame
    orders        name -> per layer the bundle at each place; None: as recorded (the default)
    bundle_bytes  what a bundle would take, for imagining a wider model; default: as recorded
    units         bundles predicted together, without error: one active, all wanted
    """
    for name in policies:
        policy_of(name)
    if not policies or not curves or any(not 0 < share <= 1 for share in caches):
        raise UsageError("a simulation needs policies, curves, and caches in (0, 100] %")
    for what, sizes in (("frames hold", per_frames), ("units are", units)):
        if not sizes or any(n < 1 for n in sizes):
            raise UsageError(f"{what} one or more bundles, not {list(sizes)}")
    active = [trace.active(layer) for layer in range(len(trace.layers))]
    rows = []
    for order_name, order in (orders or {"file": None}).items():
        for per_frame, unit in product(per_frames, units):
            used = [
                frames_used(first, ids, n_bundles=info.n_bundles, per_frame=per_frame, unit=unit,
                            order=None if order is None else order[layer])
                for layer, (info, (first, ids)) in enumerate(zip(trace.layers, active, strict=True))
            ]  # fmt: skip
            sizes = [
                align_up(per_frame * (bundle_bytes or info.bundle_bytes), FRAME_ALIGNMENT)
                for info in trace.layers
            ]
            bundles = [bundle_bytes or info.bundle_bytes for info in trace.layers]
            for share in caches:
                rows += _policies(
                    trace.n_tokens, used, sizes, bundles, share, policies, curves,
                    {"order": order_name, "unit": unit, "per_frame": per_frame,
                     "cache": share},
                )  # fmt: skip
    return rows


def slots_for(share: float, n_frames: int) -> int:
    return max(1, min(n_frames, round(share * n_frames)))


def _policies(n_tokens, used, sizes, bundles, share, policies, curves, said) -> list[Row]:
    found = {name: _misses(used, share, name) for name in policies}
    fewest = sum(len(m) for m in found["belady"]) if "belady" in found else None
    n_wanted = sum(len(uses.frames) for uses in used)
    absent = sum(
        (uses.n_frames - slots_for(share, uses.n_frames)) * size
        for uses, size in zip(used, sizes, strict=True)
    )
    rows = []
    for name in policies:
        n_missed = sum(len(m) for m in found[name])
        costs = {
            curve.name: [
                cost(m, curve, frame_bytes=size, gap_limit=MAX_GAP)
                for m, size in zip(found[name], sizes, strict=True)
            ]
            for curve in curves
        }
        first = costs[curves[0].name]
        n_bytes = sum(c.n_bytes for c in first)
        useful = sum(
            int(m.n_active.sum()) * size for m, size in zip(found[name], bundles, strict=True)
        )
        rows.append(Row(
            **said,
            frame_bytes=max(sizes),
            policy=name,
            hit_rate=1 - n_missed / n_wanted if n_wanted else 1.0,
            misses=n_missed,
            misses_per_token=n_missed / n_tokens,
            ops_per_token=sum(c.n_ops for c in first) / n_tokens,
            bytes_per_token=n_bytes / n_tokens,
            useful=useful / n_bytes if n_bytes else None,
            above_belady=(n_missed - fewest) / fewest if fewest else None,
            ms={key: 1e3 * sum(c.seconds for c in many) / n_tokens
                for key, many in costs.items()},
            sweep_ms={c.name: 1e3 * absent / c.sequential_bytes_per_s for c in curves},
        ))  # fmt: skip
    return rows


def _misses(used: list[Uses], share: float, name: str) -> list:
    found = []
    kind, options = policy_of(name)
    for uses in used:
        extra = {"future": uses.steps()} if name == "belady" else options
        found.append(replay(uses, kind(slots_for(share, uses.n_frames), **extra)))
    return found


def policy_of(name: str) -> tuple[type[Policy], dict[str, Any]]:
    """Class and arguments of `lru`, or of `window:8` (its tokens) and `lfu:0.95` (its decay).

    UnknownNameError for another name, UsageError for an option that cannot be.
    """
    kind, _, option = name.partition(":")
    found = POLICIES[kind]
    if not option:
        return found, {}
    try:
        if kind == "window" and int(option) > 0:
            return found, {"k": int(option)}
        if kind == "lfu" and 0 < float(option) <= 1:
            return found, {"decay": float(option)}
    except ValueError:
        pass
    raise UsageError(f"policy {name!r}: options are window:TOKENS and lfu:DECAY")
