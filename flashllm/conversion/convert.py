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
from ..container import ContainerWriter
from ..durable import expect_other
from ..errors import CheckpointError
from ..models.base import VectorRole
from ..tracing.activity import BLOB
from .layout import check_quant
from .opening import open_source
from .planning import Plan, check_bundle, check_order, neuron_order, plan_conversion
from .resolve import Resolved
from .source import ItemSource

# Part of a container's identity: raised whenever the same input would give other bytes.
CONVERTER_VERSION = 2

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
    activity: bytes | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts the checkpoint or container `input` (a path, or opened) into the container `output`.

    quant: "keep" (types as the checkpoint has them), "f32", "f16", "bf16", "int8" or "int4"; norms
    and biases are float32 in each.  codec: "auto" measures and decides (the report's `codecs` says
    what), or a codec's name for every plane that it can code.  order: layer -> int array of the
    checkpoint's neuron at each place of the file.  bundle: "split" keeps the FFN's deciding rows
    in planes of their own, "all" puts them into the bundles, "rows" makes each matrix of a dense
    FFN a plane of its rows (Roles.arranged); None: split where the family is naturally sparse, rows
    where it is not.  frame_bytes: the size of all frames, for
    experiments.  flash_bytes_per_s: what the target device reads; with it decoding is
    measured too and the codec decided by what streams fastest.
    tokenizer: a tokenizer.json, or an RWKV World vocabulary, instead of what the source has.
    activity: what tokens use of each layer, to be carried (tracing.activity.encode_activity).
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
        if activity is not None:
            carried = {**carried, BLOB: activity}
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
        expect_other(output, source, "a file of the source")
