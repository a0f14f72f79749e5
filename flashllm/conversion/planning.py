"""What a conversion decides before the first byte is written: layout, codecs, alignment, orders.

Reads a sample of the checkpoint for each group of planes and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoints import Checkpoint
from ..codecs import CODECS
from ..codecs.choice import measure_codec
from ..errors import UsageError
from ..models.base import BUNDLINGS, bundling
from ..units import align_up
from .layout import (
    ALIGNMENTS,
    DECODE_BYTES_PER_S,
    MAX_WASTE,
    PlanePlan,
    choose_codec,
    cut,
    lay_out_plane,
    wasted_share,
)
from .resolve import Resolved, resolve, stored_types
from .source import COLUMNS_IN_MEMORY_BYTES, ItemSource

_SAMPLE_BYTES = 2**20
_INDEX_BYTES_PER_FRAME = 20


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first byte is written."""

    resolved: Resolved
    planes: list[PlanePlan]
    alignment: int
    codecs: dict[str, dict]
    estimate_bytes: int
    bundle: str | None = None


def plan_conversion(
    checkpoint: Checkpoint,
    *,
    quant: str,
    codec: str,
    bundle: str | None,
    frame_bytes: int | None,
    flash_bytes_per_s: float | None,
    folder: Path,
) -> Plan:
    """Decides everything; reads a sample per group of planes and writes nothing."""
    resolved = resolve(checkpoint)
    roles = resolved.roles.arranged(bundle or "rows")
    if bundle == "rows" and bundling([role.name for role in roles.planes]) != "rows":
        raise UsageError(f"{checkpoint.path}: bundling rows is for FFNs of which every token needs "
                         f"all; with {resolved.config.activation} this model has none")
    laid_out = []
    for role in roles.planes:
        pieces, parts = lay_out_plane(role, stored_types(resolved, checkpoint, role), quant)
        tensors = tuple(resolved.names[tensor] for _, tensor in role.tensors)
        laid_out.append((role, pieces, parts, tensors))

    def planes_for(codecs: dict[str, dict], alignment: int) -> list[PlanePlan]:
        made = []
        for role, pieces, parts, tensors in laid_out:
            shape = cut(
                role.name,
                role.kind,
                role.use,
                role.n_items,
                pieces,
                parts,
                codec=codecs[_group(role.use, pieces)]["codec"] if codecs else "raw",
                alignment=alignment,
                frame_bytes=frame_bytes,
                n_each=role.n_each,
            )
            made.append(PlanePlan(role, shape, tensors))
        return made

    codecs: dict[str, dict] = {}
    for plane in planes_for({}, ALIGNMENTS[0]):
        group = _group(plane.role.use, plane.shape.pieces)
        # the first layer is unusual in most models; the last one read is a middle or late one
        if group not in codecs or plane.role.name == f"layers.1.{plane.role.name.split('.')[-1]}":
            codecs[group] = _measure(checkpoint, plane, codec, flash_bytes_per_s, folder)
    alignment = ALIGNMENTS[0]
    if wasted_share([p.shape for p in planes_for(codecs, alignment)], alignment) > MAX_WASTE:
        alignment = ALIGNMENTS[-1]
    planes = planes_for(codecs, alignment)
    return Plan(
        resolved, planes, alignment, codecs, _estimate(checkpoint, planes, codecs, alignment),
        bundle,
    )  # fmt: skip


def _group(use: str, pieces) -> str:
    return f"{use} {'+'.join(sorted({piece.weight_type for piece in pieces}))}"


def _measure(
    checkpoint: Checkpoint,
    plane: PlanePlan,
    codec: str,
    flash_bytes_per_s: float | None,
    folder: Path,
) -> dict:
    """Ratios of the codecs on a sample of the plane's own items, and the codec to use."""
    types = {piece.weight_type for piece in plane.shape.pieces}
    if codec not in ("auto", "zstd"):
        fits = CODECS[codec].accepts(types)
        return {"codec": codec if fits else "raw", "ratios": {}, "reason": "asked for"}
    n_items = max(1, min(plane.role.n_items, _SAMPLE_BYTES // plane.shape.stride))
    sample = ItemSource(checkpoint, plane, folder=folder, order=None).sample(n_items)
    frame = memoryview(np.ascontiguousarray(sample)).cast("B")
    ratios = {
        name: round(len(frame) / len(kind.encode(frame)), 3)
        for name, kind in CODECS.items()
        if name != "raw" and kind.accepts(types)
    }
    found = {"ratios": ratios, "sample_bytes": len(frame)}
    if codec == "zstd":  # 16-bit types may have their bytes split into planes ahead of zstd
        return {"codec": max(ratios, key=ratios.get), "reason": "asked for", **found}
    decoding = {}
    if flash_bytes_per_s is not None:
        decoding = {name: measure_codec(name, [frame]).decode_bytes_per_s for name in ratios}
    chosen, reason = choose_codec(
        plane.role.use, types, ratios, flash_bytes_per_s=flash_bytes_per_s,
        decode_bytes_per_s=decoding or DECODE_BYTES_PER_S,
    )  # fmt: skip
    return {"codec": chosen, "reason": reason, **found}


def _estimate(
    checkpoint: Checkpoint, planes: list[PlanePlan], codecs: dict[str, dict], alignment: int
) -> int:
    """Bytes the container and the largest scratch file will take, a little high."""
    total = scratch = 0
    for plane in planes:
        decided = codecs[_group(plane.role.use, plane.shape.pieces)]
        ratio = decided["ratios"].get(plane.shape.codec, 1.0)
        frame = align_up(int(plane.shape.frame_bytes / ratio * 1.02) + alignment, alignment)
        total += plane.shape.n_frames * (frame + _INDEX_BYTES_PER_FRAME) + 16384
        for (_, tensor), name in zip(plane.role.tensors, plane.tensors, strict=True):
            n_bytes = tensor.n_items * tensor.n_cols * checkpoint.itemsize(name)
            if tensor.transposed and n_bytes > COLUMNS_IN_MEMORY_BYTES:
                scratch = max(scratch, n_bytes)
    return total + scratch


def check_order(order: dict[int, np.ndarray] | None, plan: Plan) -> dict[int, np.ndarray]:
    """The given orders as int64 arrays, each a permutation of a layer's neurons."""
    config, checked = plan.resolved.config, {}
    if order and any(plane.role.use == "experts" for plane in plan.planes):
        raise UsageError("an order of neurons is not defined for a model with experts")
    if order and bundling([plane.role.name for plane in plan.planes]) == "rows":
        raise UsageError("an order of neurons is not defined where an FFN lies by rows: ask for "
                         "bundle all")
    for layer, ids in (order or {}).items():
        ids = np.asarray(ids)
        n = config.intermediate_size
        if not 0 <= layer < config.n_layers:
            raise UsageError(f"order of layer {layer}: the model has {config.n_layers} layers")
        if ids.shape != (n,) or not np.array_equal(np.sort(ids), np.arange(n)):
            raise UsageError(f"order of layer {layer} is not a permutation of {n} neurons")
        checked[int(layer)] = ids.astype(np.int64)
    return checked


def check_bundle(bundle: str | None) -> None:
    if bundle not in (None, *BUNDLINGS):
        raise UsageError(f"unknown bundling {bundle!r}; known: {', '.join(BUNDLINGS)}")


def neuron_order(name: str, orders: dict[int, np.ndarray]) -> np.ndarray | None:
    """The order that applies to a plane or vector: that of its layer, if it runs over neurons."""
    parts = name.split(".")
    per_neuron = name.endswith((".ffn", ".deciding", ".deciding.bias", ".gate.bias", ".up.bias"))
    return orders.get(int(parts[1])) if per_neuron else None
