"""How much memory a store takes, as pure functions: the plan and the store ask the same ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..cache.arena import REGION_ALIGNMENT, arena_bytes
from ..cache.ledger import THREAD_BYTES
from ..cache.policies import POLICIES
from ..cache.segment import Segment
from ..container.base import CODECS, Plane
from ..units import KIB, MIB, align_up
from .frames import RAW, slot_bytes

DEMAND_BYTES = 4 * MIB
DECODE_THREADS = 2
MAX_GAP = 128 * KIB  # no gap longer than this is read through; the trash region's size

# Python objects of one plane: arrays' headers, segment, source, sweep (measured: 2.3 KiB, 3.1 at
# most while stepping).
PLANE_OBJECT_BYTES = 4 * KIB
ZSTD_BYTES = MIB  # the zstandard module: 0.3 MiB of memory, and its file's pages while cold


def slot_bytes_of(container) -> dict[str, int]:
    """Plane name -> bytes of one slot."""
    return {p.name: slot_bytes(p, container.alignment) for p in container.planes.values()}


def _most_stored(plane: Plane, alignment: int) -> int:
    return align_up(int(plane.stored.max()), alignment)


def stage_areas(container, stage_bytes: int) -> tuple[int, int]:
    """(bytes read, bytes decoded) of a stage that holds any plane's largest frame.

    The decoded area is 0 in a container without coded planes.
    """
    raw = decoded = 0
    for plane in container.planes.values():
        raw = max(raw, _most_stored(plane, container.alignment))
        if plane.codec != RAW:
            decoded = max(decoded, slot_bytes(plane, container.alignment))
    raw = align_up(max(raw, stage_bytes), container.alignment)
    return raw, align_up(max(decoded, stage_bytes), 64) if decoded else 0


def demand_half_bytes(container, demand_bytes: int) -> int:
    """Bytes of one half of the demand area: any one frame, as read and decoded, fits."""
    least = 0
    for plane in container.planes.values():
        least_here = _most_stored(plane, container.alignment)
        if plane.codec != RAW:  # decoded first; as read from the next aligned place on
            least_here += align_up(slot_bytes(plane, container.alignment), container.alignment)
        least = max(least, least_here)
    return align_up(max(least, demand_bytes // 2), max(4096, container.alignment))


def regions(
    container,
    *,
    resident: Mapping[str, int],
    stage_bytes: int,
    ring_stages: int,
    demand_bytes: int,
) -> dict[str, int]:
    """The arena's regions: name -> bytes.

    resident  plane name -> frames (dense planes) or slots (sparse planes) kept in memory
    """
    raw, decoded = stage_areas(container, stage_bytes)
    sizes = {
        "stream ring": ring_stages * raw,
        "stream ring, decoded": ring_stages * decoded,
        "demand": 2 * demand_half_bytes(container, demand_bytes),
        "trash": MAX_GAP,
    }
    each = slot_bytes_of(container)
    for name, n in resident.items():
        sizes[f"slots of {name}"] = n * each[name]
    return sizes


def store_bytes(
    container,
    *,
    resident: Mapping[str, int],
    sparse: Collection[str] = (),
    policy: str,
    stage_bytes: int,
    ring_stages: int,
    demand_bytes: int,
    decode_threads: int,
) -> dict[str, int]:
    """Ledger lines of a store with these arguments: line -> bytes (WeightStore's own arguments).

    The container's index arrays and the threads' stacks are not among them.
    """
    sizes = regions(
        container, resident=resident, stage_bytes=stage_bytes, ring_stages=ring_stages,
        demand_bytes=demand_bytes,
    )  # fmt: skip

    def total(*prefixes: str) -> int:
        return arena_bytes({k: n for k, n in sizes.items() if k.startswith(prefixes)})

    bundles = arena_bytes({n: sizes[f"slots of {n}"] for n in resident if n in sparse})
    tables = 0
    for name, plane in container.planes.items():
        n_slots = resident.get(name, 0)
        tables += Segment.table_bytes(plane.n_frames, n_slots) + PLANE_OBJECT_BYTES
        if name in sparse:
            # last use (4) and the sweep's marks (1) per frame; policy and prefetch mark per slot
            tables += 5 * plane.n_frames + n_slots * (1 + POLICIES[policy].bytes_per_slot)
    # What a request works in (taking.py).
    tables += 4 * max((container.planes[name].n_frames for name in sparse), default=0)
    coded = [p for p in container.planes.values() if p.codec != RAW]
    decoders = sum(
        max(CODECS[name].decoder_bytes(p.frame_bytes) for p in coded if p.codec == name)
        for name in {p.codec for p in coded}
    )
    return {
        "resident planes": total("slots of ") - bundles,
        "bundle slots": bundles,
        "stream ring": total("stream ring"),
        "demand area": total("demand", "trash"),
        "store tables": tables,
        "decoders": (decoders + THREAD_BYTES) * decode_threads + ZSTD_BYTES if coded else 0,
    }


@dataclass(frozen=True)
class StoreCosts:
    """What a plan needs to know: lines that do not depend on it, and bytes per ring stage."""

    fixed: dict[str, int]
    stage: int


def store_costs(
    container,
    *,
    stage_bytes: int,
    demand_bytes: int = DEMAND_BYTES,
    decode_threads: int = DECODE_THREADS,
    policy: str = "lfu",
    sparse: Collection[str] | None = None,
) -> StoreCosts:
    """The costs of a store whatever it keeps: tables are counted as for full residency.

    Slots cost `slot_bytes_of`; each plane's slots and each ring are rounded up to pages.
    """
    lines = store_bytes(
        container, resident={p.name: p.n_frames for p in container.planes.values()},
        sparse=sparse_planes(container) if sparse is None else sparse, policy=policy,
        stage_bytes=stage_bytes, ring_stages=0, demand_bytes=demand_bytes,
        decode_threads=decode_threads,
    )  # fmt: skip
    fixed = {name: lines[name] for name in ("demand area", "store tables", "decoders")}
    fixed["container index"] = container.index_bytes
    # Page rounding of the slots of every plane and of the ring's two regions.
    fixed["store tables"] += REGION_ALIGNMENT * (len(container.planes) + 2)
    return StoreCosts(fixed, sum(stage_areas(container, stage_bytes)))


def sparse_planes(container) -> set[str]:
    """The planes that `acquire` serves: bundles that stand beside a deciding plane, and experts."""
    names, routed = container.planes, routed_planes(container)
    return routed | {
        name
        for name, plane in names.items()
        if plane.kind == "bundles" and name.rpartition(".")[0] + ".deciding" in names
    }


def routed_planes(container) -> set[str]:
    """Planes of experts, or of their neurons, beside a router, which says exactly what to read."""
    return {
        name
        for name, plane in container.planes.items()
        if plane.kind == "bundles"
        and name.endswith((".experts", ".neurons"))
        and name.rpartition(".")[0] + ".router" in container.planes
    }
