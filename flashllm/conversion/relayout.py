"""relayout: the same container with the neurons of its sparse layers in another order.

Every stored value is carried bit by bit; only places change, of bundles, of the deciding rows and
of what else runs over neurons.  The function is the same up to the order of the down sum, which is
that of the file (docs/ARITHMETIC.md).  Orders come from a trace (tracing/order.py).
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
from ..errors import UsageError
from ..tracing import Trace, read_trace
from ..tracing.order import order_for
from .convert import CONVERTER_VERSION, neuron_order
from .from_container import PlaneReader
from .layout import ALIGNMENTS, MAX_WASTE, wasted_share
from .source import gather

WHOLE_BYTES = 32 * 2**20  # a plane up to this is turned in memory; a larger one block by block
BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class RelayoutReport:
    """`moved`: sparse layers that got an order; `per_frame` by plane: bundles in its frames."""

    output: str
    digest: str
    moved: int
    per_frame: dict[str, int]
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
    trace: str | os.PathLike,
    per_frame: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> RelayoutReport:
    """Write the container `input` as `output`, laid out by the trace of that very container.

    per_frame: bundles in a frame of every sparse layer; None keeps what the container has.
    UsageError for a trace of another container; the rest as `convert` raises.
    """
    started, output, recorded = time.monotonic(), Path(output), read_trace(trace)
    with open_container(input) as source:
        if recorded.model != source.digest:
            raise UsageError(f"{trace} was recorded of container {recorded.model[:16]}…, "
                             f"{input} is {source.digest[:16]}…")
        if output.exists() and os.path.samefile(input, output):
            raise UsageError(f"{output} is the source; it would be overwritten")
        sizes = {}
        for info in recorded.layers:
            plane = source.planes[info.plane]
            sizes[info.plane] = min(per_frame or plane.per_frame, plane.n_items)
            if not 1 <= sizes[info.plane] * plane.stride <= max(MAX_FRAME_BYTES, plane.stride):
                raise UsageError(f"frames of {per_frame} bundles are not 1 to "
                                 f"{MAX_FRAME_BYTES // plane.stride} of {info.plane}")
        orders = orders_from(recorded, sizes)
        told = {str(i): hashlib.sha256(ids.tobytes()).hexdigest() for i, ids in orders.items()}
        options = {"converter": CONVERTER_VERSION, "relayout": told, "per_frame": sizes}
        total = sum(plane.n_frames * plane.frame_bytes for plane in source.planes.values())
        done = 0
        with ContainerWriter(
            output,
            family=source.family,
            config=source.config,
            alignment=_alignment(source, sizes),
            source=source.digest,
            options=options,
            meta={**source.meta, "layout": {"trace": recorded.text, "of": source.digest}},
            overwrite=overwrite,
            estimate_bytes=source.size,
        ) as writer:
            for name, plane in source.planes.items():
                if writer.begin_plane(
                    name, plane.kind, plane.pieces, plane.n_items,
                    sizes.get(name, plane.per_frame), plane.codec, plane.parts,
                ):  # fmt: skip
                    reader = PlaneReader(plane, source)
                    for items in _blocks(reader, neuron_order(name, orders)):
                        writer.write_items(items)
                    writer.end_plane()
                done += plane.n_frames * plane.frame_bytes
                if progress is not None:
                    progress(done, total, name)
            for name, values in source.load_vectors().items():
                ids = neuron_order(name, orders)
                writer.add_vectors({name: values if ids is None else values[ids]})
            for name in source.blobs:
                writer.add_blob(name, source.read_blob(name))
            digest = writer.commit()
    return RelayoutReport(str(output), digest, len(orders), sizes, time.monotonic() - started)


def _alignment(source: Container, per_frame: dict[str, int]) -> int:
    """That of the source, unless frames of the new sizes would waste too much on padding."""
    shapes = [
        PlaneShape(name, plane.kind, plane.n_items, per_frame.get(name, plane.per_frame),
                   plane.codec, plane.pieces, plane.parts)
        for name, plane in source.planes.items()
    ]  # fmt: skip
    wasteful = wasted_share(shapes, source.alignment) > MAX_WASTE
    return min(source.alignment, ALIGNMENTS[-1]) if wasteful else source.alignment


def _blocks(reader: PlaneReader, order: np.ndarray | None) -> Iterator[np.ndarray]:
    """All items of a plane in their new order, uint8 [k, stride] at a time."""
    plane = reader.plane
    step = max(1, BLOCK_BYTES // plane.stride)
    read = reader.whole
    if order is not None and plane.n_items * plane.stride <= WHOLE_BYTES:
        everything = reader.whole(0, plane.n_items)
        read = lambda start, stop: everything[start:stop]  # noqa: E731
    for start in range(0, plane.n_items, step):
        stop = min(start + step, plane.n_items)
        yield read(start, stop) if order is None else gather(read, order[start:stop])
