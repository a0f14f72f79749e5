"""Trace x order x frame size x predictor x cache x policy -> hits, bytes, operations and time.

Every layer has a cache of its own, as the engine's segments have, of the same share of its frames
or by what layers use; caches live on from one context of the trace to the next.  What is wanted is
what is active, as in exact mode, or the units of neighbouring bundles in which something is, and
what a predictor asks for ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import numpy as np

from ..cache import POLICIES, Policy
from ..cache.shares import shared_out
from ..errors import UsageError
from ..offload.state import MAX_GAP
from ..tracing import Trace
from ..tracing.base import MAX_BUNDLE_BYTES, MAX_BUNDLES, MAX_TOKENS
from ..units import align_up
from .costs import SimulationCurve, cost
from .guesses import NONE, Sets, check_guesses, guesses
from .replay import Misses, Uses, frames_used, replay

FRAME_ALIGNMENT = 512


@dataclass(frozen=True)
class Row:
    """One configuration, per token over all layers.

    `hit_rate` is of the frames wanted, those that a predictor wanted among them; `useful` the share
    of the bytes read (on the first curve) that active bundles take; `above_belady` misses beyond
    Belady's as a share of them; `ms` is flash time per token by curve name, `sweep_ms` that of
    reading in sequence everything the cache lacks.  Of a predictor's reads `ahead_bytes` are those
    of frames, without gaps, and `wasted_bytes` those of them in which nothing was active; what it
    missed is read in a second batch.  `recall` and `precision` are of its bundles.
    """

    order: str
    unit: int
    per_frame: int
    frame_bytes: int
    predictor: str
    shares: str
    cache: float
    policy: str
    hit_rate: float
    misses: int
    misses_per_token: float
    ops_per_token: float
    bytes_per_token: float
    useful: float | None
    above_belady: float | None
    ahead_bytes_per_token: float = 0.0
    wasted_bytes_per_token: float = 0.0
    recall: float | None = None
    precision: float | None = None
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
    predictors: Sequence[str] = (NONE,),
    shares: dict[str, Sequence[float] | None] | None = None,
) -> list[Row]:
    """A row per configuration, in the order of the arguments.

    policies      names of cache.POLICIES, some with an option (`policy_of`); with "belady" among
                  them distances from it are known
    caches        shares of all frames that are cached, above 0 and at most 1
    per_frames    bundles per frame
    orders        name -> per layer the bundle at each place; None: as recorded (the default)
    bundle_bytes  what a bundle would take, for imagining a wider model; default: as recorded
    units         bundles predicted together, without error: one active, all wanted
    predictors    what asks ahead, by name (guesses.py)
    shares        name -> per layer what a token uses of it, by which layers get slots; None: every
                  layer gets the same share of its frames (the default)
    """
    for name in policies:
        policy_of(name)
    for name in predictors:
        check_guesses(name)
    if not policies or not curves or any(not 0 < share <= 1 for share in caches):
        raise UsageError("a simulation needs policies, curves, and caches in (0, 100] %")
    for what, sizes in (("frames hold", per_frames), ("units are", units)):
        if not sizes or not all(1 <= n <= MAX_BUNDLES for n in sizes):
            raise UsageError(f"{what} 1 to {MAX_BUNDLES} bundles, not {list(sizes)}")
    if bundle_bytes is not None and not 1 <= bundle_bytes <= MAX_BUNDLE_BYTES:
        raise UsageError(f"bundles are 1 to {MAX_BUNDLE_BYTES} bytes, not {bundle_bytes}")
    active = [trace.active(layer) for layer in range(len(trace.layers))]
    rows = []
    for order_name, order in (orders or {"file": None}).items():
        for per_frame, unit, predictor in product(per_frames, units, predictors):
            asked = [
                guesses(predictor, *ids, n_bundles=info.n_bundles, starts=trace.starts, seed=layer)
                for layer, (info, ids) in enumerate(zip(trace.layers, active, strict=True))
            ]
            used = [
                frames_used(*ids, n_bundles=info.n_bundles, per_frame=per_frame, unit=unit,
                            order=None if order is None else order[layer], asked=asked[layer])
                for layer, (info, ids) in enumerate(zip(trace.layers, active, strict=True))
            ]  # fmt: skip
            bundles = [bundle_bytes or info.bundle_bytes for info in trace.layers]
            layers = _Layers(
                trace.n_tokens, used, bundles,
                [align_up(per_frame * size, FRAME_ALIGNMENT) for size in bundles],
            )  # fmt: skip
            said = {"order": order_name, "unit": unit, "per_frame": per_frame,
                    "predictor": predictor, **_quality(active, asked)}  # fmt: skip
            for share, (name, weights) in product(caches, (shares or {"equal": None}).items()):
                slots = slots_by(share, [uses.n_frames for uses in used], weights)
                rows += _policies(layers, slots, policies, curves,
                                  {**said, "cache": share, "shares": name})  # fmt: skip
    return rows


@dataclass(frozen=True, eq=False)
class _Layers:
    """What every configuration of caches has in common: per layer the frames wanted, the bytes of
    a bundle and of a frame."""

    n_tokens: int
    used: list[Uses]
    bundles: list[int]
    frames: list[int]


def _quality(active: list[Sets], asked: list[Sets | None]) -> dict[str, float]:
    """Recall and precision of a predictor over all layers."""
    n_hit = n_asked = 0
    for (first, ids), guess in zip(active, asked, strict=True):
        if guess is None:
            return {}
        n_asked += len(guess[1])
        for t in range(len(first) - 1):
            n_hit += np.isin(ids[first[t] : first[t + 1]],
                             guess[1][guess[0][t] : guess[0][t + 1]], assume_unique=True).sum()
    n_active = sum(len(ids) for _, ids in active)
    return {"recall": float(n_hit / max(1, n_active)), "precision": float(n_hit / max(1, n_asked))}


def slots_for(share: float, n_frames: int) -> int:
    return max(1, min(n_frames, round(share * n_frames)))


def slots_by(share: float, n_frames: list[int], weights: Sequence[float] | None) -> list[int]:
    """Slots of each layer, of `share` of all frames together; `weights` as in `simulate`."""
    if weights is None:
        return [slots_for(share, n) for n in n_frames]
    uses = [weight * n for weight, n in zip(weights, n_frames, strict=True)]
    return [max(1, round(n)) for n in shared_out(share * sum(n_frames), uses, n_frames)]


def _policies(layers: _Layers, slots, policies, curves, said) -> list[Row]:
    found = {name: _misses(layers.used, slots, name) for name in policies}
    fewest = sum(len(m) for m in found["belady"]) if "belady" in found else None
    n_wanted = sum(len(uses.frames) for uses in layers.used)
    absent = sum(
        (uses.n_frames - n) * size
        for uses, n, size in zip(layers.used, slots, layers.frames, strict=True)
    )
    rows = []
    for name in policies:
        n_missed = sum(len(m) for m in found[name])
        costs = {
            curve.name: [
                cost(batch, curve, frame_bytes=size, gap_limit=MAX_GAP)
                for m, size in zip(found[name], layers.frames, strict=True)
                for batch in (m.where(m.ahead), m.where(~m.ahead))
            ]
            for curve in curves
        }
        first = costs[curves[0].name]
        n_bytes = sum(c.n_bytes for c in first)
        useful = sum(
            int(m.n_active.sum()) * size
            for m, size in zip(found[name], layers.bundles, strict=True)
        )

        def bytes_of(mask, name=name) -> float:
            return sum(size * np.count_nonzero(mask(m)) for m, size in
                       zip(found[name], layers.frames, strict=True)) / layers.n_tokens  # fmt: skip

        rows.append(Row(
            **said,
            frame_bytes=max(layers.frames),
            policy=name,
            hit_rate=1 - n_missed / n_wanted if n_wanted else 1.0,
            misses=n_missed,
            misses_per_token=n_missed / layers.n_tokens,
            ops_per_token=sum(c.n_ops for c in first) / layers.n_tokens,
            bytes_per_token=n_bytes / layers.n_tokens,
            useful=useful / n_bytes if n_bytes else None,
            above_belady=(n_missed - fewest) / fewest if fewest else None,
            ahead_bytes_per_token=bytes_of(lambda m: m.ahead),
            wasted_bytes_per_token=bytes_of(lambda m: m.ahead & (m.n_active == 0)),
            ms={key: 1e3 * sum(c.seconds for c in many) / layers.n_tokens
                for key, many in costs.items()},
            sweep_ms={c.name: 1e3 * absent / c.sequential_bytes_per_s for c in curves},
        ))  # fmt: skip
    return rows


def _misses(used: list[Uses], slots: list[int], name: str) -> list[Misses]:
    found = []
    kind, options = policy_of(name)
    for uses, n_slots in zip(used, slots, strict=True):
        extra = {"future": uses.steps()} if name == "belady" else options
        found.append(replay(uses, kind(n_slots, **extra)))
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
        if kind == "window" and 0 < int(option) <= MAX_TOKENS:
            return found, {"k": int(option)}
        if kind == "lfu" and 0 < float(option) <= 1:
            return found, {"decay": float(option)}
    except ValueError:
        pass
    raise UsageError(f"policy {name!r}: options are window:TOKENS and lfu:DECAY")
