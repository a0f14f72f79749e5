"""relayout: the same container with its neurons in another order, or their pieces elsewhere.

Every stored value is carried bit by bit; only places change, of bundles, of the deciding rows and
of what else runs over neurons.  The function is the same up to the order of the down sum, which is
that of the file (docs/ARITHMETIC.md).  Orders come from a trace (tracing/order.py); where a
neuron's pieces lie is rearrange.py's business.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..container import Container, ContainerWriter, open_container
from ..container.base import MAX_FRAME_BYTES, PlaneShape
from ..durable import expect_other
from ..errors import UsageError
from ..models.base import bundling
from ..predictors.fit import is_fit_blob
from ..tracing import Trace, read_trace
from ..tracing.activity import BLOB, encode_activity
from ..tracing.order import order_for
from .convert import CONVERTER_VERSION
from .layout import ALIGNMENTS, MAX_WASTE, wasted_share
from .planning import check_bundle, neuron_order
from .rearrange import Target, targets
from .source import gather

WHOLE_BYTES = 32 * 2**20  # a plane up to this is turned in memory; a larger one block by block
BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class RelayoutReport:
    """`moved`: sparse layers that got an order; `per_frame` by plane: bundles in its frames;
    `bundle`: how the planes are arranged now (models.base.bundling)."""

    output: str
    digest: str
    moved: int
    per_frame: dict[str, int]
    bundle: str | None
    seconds: float


def orders_from(trace: Trace, per_frame: dict[str, int]) -> dict[int, np.ndarray]:
    """Layer -> order, fitted to the trace for frames of `per_frame` bundles (by plane)."""
    return {
        int(info.plane.split(".")[1]): order_for(trace.bits(i), per_frame=per_frame[info.plane])
        for i, info in enumerate(trace.layers)
    }


def relayout(
    input: str | os.PathLike,  # noqa: A002 (as convert's)
    output: str | os.PathLike,
    *,
    trace: str | os.PathLike | None = None,
    bundle: str | None = None,
    per_frame: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> RelayoutReport:
    """Write the container `input` as `output`, laid out anew.

    trace: of that very container: its order by co-activation, and what tokens use of each layer,
    which the new container carries (tracing/activity.py); None keeps the order.
    bundle: "all" or "split" (Roles.arranged); None keeps the arrangement.  From and to "rows" there
    is no way that carries every bit.
    per_frame: bundles in a frame of every layer of neurons; None takes as few as padding allows
    with a trace or bundle "all", which are for picking, what a conversion would with "split".
    UsageError for a trace of another container or nothing to do; the rest as `convert` raises.
    """
    started, output = time.monotonic(), Path(output)
    check_bundle(bundle)
    by_rows = "rows of a down projection have scales of their own, which no neuron has: convert "
    if bundle == "rows":
        raise UsageError(f"{by_rows}the checkpoint, or {input}, with bundle rows")
    if trace is None and bundle is None and per_frame is None:
        raise UsageError("nothing to lay out anew: give a trace, a bundling or bundles per frame")
    recorded = None if trace is None else read_trace(trace)
    with open_container(input) as source:
        if recorded is not None and recorded.model != source.digest:
            raise UsageError(f"{trace} was recorded of container {recorded.model[:16]}…, "
                             f"{input} is {source.digest[:16]}…")
        if recorded is not None and not recorded.layers[0].plane.endswith(".ffn"):
            raise UsageError(f"{trace} is of {recorded.layers[0].plane}: it orders no neurons")
        if bundling(source.planes) == "rows":
            raise UsageError(f"{by_rows}the checkpoint, or {input}, with bundle all or split")
        expect_other(output, input, "the source")
        picked = recorded is not None or bundle == "all"
        made = targets(source, bundle=bundle, per_frame=per_frame, picked=picked)
        sizes = {t.shape.name: t.shape.per_frame for t in made if t.shape.name.endswith(".ffn")}
        for target in made:
            least, most = 1, max(1, MAX_FRAME_BYTES // target.shape.stride)
            if not least <= target.shape.per_frame <= most:
                raise UsageError(f"frames of {per_frame} bundles are not {least} to {most} of "
                                 f"{target.shape.name}")
        orders = {} if recorded is None else orders_from(recorded, sizes)
        told = {str(i): hashlib.sha256(ids.tobytes()).hexdigest() for i, ids in orders.items()}
        options = {"converter": CONVERTER_VERSION, "relayout": told, "per_frame": sizes}
        layout = {"of": source.digest}
        if recorded is not None:
            layout["trace"] = recorded.text
        if bundle is not None:
            options["bundle"] = layout["bundle"] = bundle
        total = sum(target.n_bytes for target in made)
        done = 0
        with ContainerWriter(
            output,
            family=source.family,
            config=source.config,
            alignment=_alignment(source, [target.shape for target in made]),
            source=source.digest,
            options=options,
            meta={**source.meta, "layout": layout},
            overwrite=overwrite,
            estimate_bytes=source.size,
        ) as writer:
            for target in made:
                shape = target.shape
                if writer.begin_plane(
                    shape.name, shape.kind, shape.pieces, shape.n_items, shape.per_frame,
                    shape.codec, shape.parts,
                ):  # fmt: skip
                    for items in _blocks(target, neuron_order(shape.name, orders)):
                        writer.write_items(items)
                    writer.end_plane()
                done += target.n_bytes
                if progress is not None:
                    progress(done, total, shape.name)
            for name, values in source.load_vectors().items():
                ids = neuron_order(name, orders)
                writer.add_vectors({name: values if ids is None else values[ids]})
            # Predictors name bundles by their places, which are others now.
            kept = {n: source.read_blob(n) for n in source.blobs if not is_fit_blob(n)}
            if recorded is not None:
                kept[BLOB] = encode_activity(recorded)
            for name, data in kept.items():
                writer.add_blob(name, data)
            digest = writer.commit()
        arranged = bundling([target.shape.name for target in made])
    return RelayoutReport(
        str(output), digest, len(orders), sizes, arranged, time.monotonic() - started
    )


def _alignment(source: Container, shapes: list[PlaneShape]) -> int:
    """That of the source, unless frames of the new sizes would waste too much on padding."""
    wasteful = wasted_share(shapes, source.alignment) > MAX_WASTE
    return min(source.alignment, ALIGNMENTS[-1]) if wasteful else source.alignment


def _blocks(target: Target, order: np.ndarray | None) -> Iterator[np.ndarray]:
    """All items of a plane in their new order, uint8 [k, stride] at a time."""
    n_items, stride = target.shape.n_items, target.shape.stride
    step = max(1, BLOCK_BYTES // stride)
    read = target.read
    if order is not None and n_items * stride <= WHOLE_BYTES:
        everything = read(0, n_items)
        read = lambda start, stop: everything[start:stop]  # noqa: E731
    for start in range(0, n_items, step):
        stop = min(start + step, n_items)
        yield read(start, stop) if order is None else gather(read, order[start:stop])
