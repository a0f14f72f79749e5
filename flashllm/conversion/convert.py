"""convert: a checkpoint becomes a container.

One pass over the tensors in blocks of a few MiB, whatever the size of a layer; the writer makes it
whole or not at all, and a run after a kill goes on where the killed one was.  The source is opened
for reading only.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..checkpoints import Checkpoint
from ..checkpoints.files import MAX_TOKENIZER_BYTES, read_whole
from ..codecs import CODECS
from ..codecs.choice import measure_codec
from ..container import ContainerWriter
from ..errors import CheckpointError, UsageError
from ..models.base import BUNDLINGS, VectorRole
from ..units import align_up
from .layout import (
    ALIGNMENTS,
    DECODE_BYTES_PER_S,
    MAX_WASTE,
    PlanePlan,
    check_quant,
    choose_codec,
    cut,
    lay_out_plane,
    wasted_share,
)
from .opening import open_source
from .resolve import Resolved, resolve, stored_types
from .source import COLUMNS_IN_MEMORY_BYTES, ItemSource

# Part of a container's identity: raised whenever the same input would give other bytes.
CONVERTER_VERSION = 1
_SAMPLE_BYTES = 2**20
_INDEX_BYTES_PER_FRAME = 20

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.  `codecs`: group of planes -> what was measured and chosen."""

    output: str
    digest: str
    family: str
    quant: str
    alignment: int
    source_bytes: int
    output_bytes: int
    codecs: dict[str, dict]
    warnings: list[str]
    seconds: float
    n_resumed: int = 0
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", self.source_bytes / max(1, self.output_bytes))


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first byte is written."""

    resolved: Resolved
    planes: list[PlanePlan]
    alignment: int
    codecs: dict[str, dict]
    estimate_bytes: int
    bundle: str | None = None


def convert(
    input: str | os.PathLike | Checkpoint,  # noqa: A002 (the verb's own word)
    output: str | os.PathLike,
    *,
    quant: str = "keep",
    codec: str = "auto",
    overwrite: bool = False,
    order: dict[int, np.ndarray] | None = None,
    bundle: str | None = None,
    frame_bytes: int | None = None,
    flash_bytes_per_s: float | None = None,
    tokenizer: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts the checkpoint or container `input` (a path, or opened) into the container `output`.

    quant: "keep" (types as the checkpoint has them), "f32", "f16", "bf16", "int8" or "int4"; norms
    and biases are float32 in each.  codec: "auto" measures and decides (the report's `codecs` says
    what), or a codec's name for every plane that it can code.  order: layer -> int array of the
    checkpoint's neuron at each place of the file.  bundle: "split" keeps the FFN's deciding rows
    in planes of their own, "all" puts them into the bundles (Roles.arranged); None: split where the
    family is naturally sparse, all where it is not.  frame_bytes: the size of all frames, for
    experiments.  flash_bytes_per_s: what the target device reads; with it decoding is
    measured too and the codec decided by what streams fastest.
    tokenizer: a tokenizer.json, or an RWKV World vocabulary, instead of what the source has.
    progress(done, total, label) in bytes of decoded planes.

    Peak memory: 128 MiB with the interpreter, plus the index.  Raises CheckpointError for a source
    that is malformed, UnsupportedError (naming it) for one that is not served, UsageError for wrong
    arguments, ConversionError where the disk is full or fails.  Interrupted, it is taken up by the
    next call with the same arguments.
    """
    started = time.monotonic()
    check_quant(quant)
    check_bundle(bundle)
    if codec != "auto":
        CODECS[codec]  # noqa: B018 (raises with the known names)
    output = Path(output)
    checkpoint = input if isinstance(input, Checkpoint) else open_source(input)
    try:
        _refuse_own_source(checkpoint, output)
        carried = checkpoint.tokenizer_files if tokenizer is None else given_tokenizer(tokenizer)
        plan = plan_conversion(
            checkpoint,
            quant=quant,
            codec=codec,
            bundle=bundle,
            frame_bytes=frame_bytes,
            flash_bytes_per_s=flash_bytes_per_s,
            folder=output.parent,
        )
        orders = check_order(order, plan)
        digest, n_resumed, size = _write(
            checkpoint, plan, output, quant, orders, overwrite, carried, progress
        )
    finally:
        if checkpoint is not input:
            checkpoint.close()
    return ConversionReport(
        output=str(output),
        digest=digest,
        family=plan.resolved.config.family,
        quant=quant,
        alignment=plan.alignment,
        source_bytes=checkpoint.n_bytes,
        output_bytes=size,
        codecs=plan.codecs,
        warnings=plan.resolved.warnings,
        seconds=time.monotonic() - started,
        n_resumed=n_resumed,
    )


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
    roles = resolved.roles if bundle is None else resolved.roles.arranged(bundle)
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


def _write(
    checkpoint: Checkpoint,
    plan: Plan,
    output: Path,
    quant: str,
    orders: dict[int, np.ndarray],
    overwrite: bool,
    carried: dict[str, bytes],
    progress: Progress | None,
) -> tuple[str, int, int]:
    resolved, config = plan.resolved, plan.resolved.config
    options = {
        "converter": CONVERTER_VERSION,
        "quant": quant,
        # frames and codecs are compared plane by plane when a conversion is taken up
        "order": {
            str(layer): hashlib.sha256(ids.tobytes()).hexdigest()
            for layer, ids in sorted(orders.items())
        },
    }
    if plan.bundle is not None:
        options["bundle"] = plan.bundle
    meta = {
        "converter": CONVERTER_VERSION,
        "quant": quant,
        "codecs": plan.codecs,
        "source": {"kind": checkpoint.kind, "fingerprint": checkpoint.fingerprint},
        "warnings": resolved.warnings,
    }
    total, done, n_resumed = sum(plane.decoded_bytes for plane in plan.planes), 0, 0
    with ContainerWriter(
        output,
        family=config.family,
        config=config.to_dict(),
        alignment=plan.alignment,
        source=checkpoint.fingerprint,
        options=options,
        meta=meta,
        overwrite=overwrite,
        estimate_bytes=plan.estimate_bytes,
    ) as writer:
        for plane in plan.planes:
            shape = plane.shape
            if progress:
                progress(done, total, shape.name)
            if writer.begin_plane(
                shape.name,
                shape.kind,
                shape.pieces,
                n_items=shape.n_items,
                per_frame=shape.per_frame,
                codec=shape.codec,
                parts=shape.parts,
            ):
                source = ItemSource(
                    checkpoint, plane, folder=output.parent, order=neuron_order(shape.name, orders)
                )
                written = 0
                for items in source.blocks():
                    writer.write_items(items)
                    written += items.nbytes
                    if progress:
                        progress(min(done + written, total), total, shape.name)
                writer.end_plane()
            else:
                n_resumed += 1
            done += plane.decoded_bytes
        for vector in resolved.roles.vectors:
            values = _vector(checkpoint, resolved, vector)
            ids = neuron_order(vector.name, orders)
            writer.add_vectors({vector.name: values if ids is None else values[ids]})
        for name, data in carried.items():
            writer.add_blob(name, data)
        if progress:
            progress(total, total, "sync")
        digest = writer.commit()
    return digest, n_resumed, output.stat().st_size


def given_tokenizer(path: str | os.PathLike) -> dict[str, bytes]:
    """The tokenizer file at `path` under the name it is carried by, told by its content."""
    content = read_whole(Path(path), MAX_TOKENIZER_BYTES)
    if content.lstrip()[:1] == b"{":
        return {"tokenizer.json": content}
    if re.match(rb"\d+ b?['\"]", content):
        return {"rwkv_vocab.txt": content}
    expected = "a tokenizer.json or an RWKV World vocabulary"
    raise CheckpointError(path, "first bytes", expected, content[:12])


def _vector(checkpoint: Checkpoint, resolved: Resolved, role: VectorRole) -> np.ndarray:
    parts = []
    for part in role.parts:
        name = resolved.names[part]
        values = checkpoint.rows(name, 0, part.shape[0])
        if not np.isfinite(values).all():
            raise CheckpointError(
                checkpoint.path, f"tensor {name!r}", "finite values", "inf or nan"
            )
        parts.append(values)
    return np.concatenate(parts)


def _refuse_own_source(checkpoint: Checkpoint, output: Path) -> None:
    for source in checkpoint.files:
        if output.exists() and os.path.samefile(source, output):
            raise UsageError(f"{output} is a file of the source; it would be overwritten")
