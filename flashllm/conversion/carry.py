"""The same container with other blobs: planes and vectors are carried byte by byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from ..container import ContainerWriter, open_container
from ..durable import expect_other
from ..predictors.fit import is_fit_blob
from .convert import CONVERTER_VERSION
from .from_container import PlaneReader

BLOCK_BYTES = 8 * 2**20


def with_predictors(
    source: str | os.PathLike,
    output: str | os.PathLike,
    blobs: Mapping[str, bytes],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> str:
    """Write the container `source` as `output`, which carries `blobs` in place of the predictors it
    had; returns the new digest.  Raises as `convert` does."""
    output = Path(output)
    expect_other(output, source, "the source")
    with open_container(source) as given:
        total, done = sum(p.n_items * p.stride for p in given.planes.values()), 0
        with ContainerWriter(
            output,
            family=given.family,
            config=given.config,
            alignment=given.alignment,
            source=given.digest,
            options={"converter": CONVERTER_VERSION, "blobs": sorted(blobs)},
            meta={**given.meta, "predictors_of": given.digest},
            overwrite=overwrite,
            estimate_bytes=given.size + sum(len(blob) for blob in blobs.values()),
        ) as writer:
            for plane in given.planes.values():
                if writer.begin_plane(
                    plane.name, plane.kind, plane.pieces, plane.n_items, plane.per_frame,
                    plane.codec, plane.parts,
                ):  # fmt: skip
                    reader, step = PlaneReader(plane, given), max(1, BLOCK_BYTES // plane.stride)
                    for start in range(0, plane.n_items, step):
                        stop = min(start + step, plane.n_items)
                        writer.write_items(reader.whole(start, stop))
                    writer.end_plane()
                done += plane.n_items * plane.stride
                if progress is not None:
                    progress(done, total, plane.name)
            writer.add_vectors(given.load_vectors())
            kept = {n: given.read_blob(n) for n in given.blobs if not is_fit_blob(n)}
            for name, data in {**kept, **blobs}.items():
                writer.add_blob(name, data)
            return writer.commit()
