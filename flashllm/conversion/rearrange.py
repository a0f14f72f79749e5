"""Where the pieces of a neuron lie: a container's planes as another arrangement would have them.

A Target is a plane to be written and a way to read its items in the source's order.  Joining puts
the rows of a deciding plane at the head of the bundles beside it, parting does the reverse; bytes
of rows are copied as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ..codecs.raw import RawCodec
from ..container import Container
from ..container.base import Piece, Plane, PlaneShape, lay_out_pieces
from ..models.configs import config_from_dict
from .from_container import PlaneReader
from .layout import fewest_bundles, items_per_frame, stride_of, target_frame_bytes


@dataclass(frozen=True)
class Target:
    """`read(start, stop)`: items as uint8 [stop - start, stride] of `shape`."""

    shape: PlaneShape
    read: Callable[[int, int], np.ndarray]

    @property
    def n_bytes(self) -> int:
        return self.shape.n_frames * self.shape.frame_bytes


def targets(
    source: Container, *, bundle: str | None, per_frame: int | None, picked: bool = False
) -> list[Target]:
    """The planes of `source` arranged as `bundle` says, in their order; None: as they are.

    per_frame  of planes of neurons; None: as it is, or as a conversion chooses for new bundles
    picked     None means as few as padding allows: layout.fewest_bundles
    """
    sparse = config_from_dict(source.family, source.config, path=source.path).sparse
    made = []
    for name, plane in source.planes.items():
        layer, _, last = name.rpartition(".")
        deciding = source.planes.get(f"{layer}.deciding")
        bundles = last == "ffn" and plane.kind == "bundles"
        if last == "deciding" and bundle == "all":
            continue
        if bundles and bundle == "all" and deciding is not None:
            made.append(_joined(source, deciding, plane, "sparse" if sparse else "dense"))
        elif bundles and bundle == "split" and deciding is None:
            made += _parted(source, plane)
        else:
            made.append(Target(plane, PlaneReader(plane, source).whole))
    if per_frame is None and not picked:
        return made

    def framed(shape: PlaneShape) -> PlaneShape:
        if not shape.name.endswith(".ffn") or (per_frame is None and shape.codec != RawCodec.name):
            return shape
        n = per_frame or fewest_bundles(shape.stride, shape.n_items)
        return _shape(shape, per_frame=min(n, shape.n_items))

    return [replace(target, shape=framed(target.shape)) for target in made]


def _shape(plane: PlaneShape, **changes) -> PlaneShape:
    """A plane's shape, without its frames' places."""
    names = ("name", "kind", "n_items", "per_frame", "codec", "pieces", "parts")
    return PlaneShape(**{name: getattr(plane, name) for name in names} | changes)


def _cut(
    source: Container, plane: Plane, use: str, pieces: tuple[Piece, ...], **changes
) -> PlaneShape:
    """A raw plane of other pieces, its frames as a conversion would cut them."""
    n = items_per_frame(
        stride_of(pieces), plane.n_items, target_bytes=target_frame_bytes(use, False),
        at_least=use == "sparse", alignment=source.alignment,
    )  # fmt: skip
    return _shape(plane, pieces=pieces, per_frame=n, codec=RawCodec.name, **changes)


def _placed(pieces: Iterable[tuple[str, Piece]]) -> tuple[Piece, ...]:
    return lay_out_pieces([(name, piece.weight_type, piece.n_cols) for name, piece in pieces])


def _joined(source: Container, deciding: Plane, ffn: Plane, use: str) -> Target:
    first = "gate" if any(piece.name == "up" for piece in ffn.pieces) else "up"
    old = [(deciding, deciding.pieces[0]), *((ffn, piece) for piece in ffn.pieces)]
    names = [first, *(piece.name for piece in ffn.pieces)]
    pieces = _placed(zip(names, (piece for _, piece in old), strict=True))
    return Target(_cut(source, ffn, use, pieces), _copier(source, old, pieces))


def _parted(source: Container, ffn: Plane) -> list[Target]:
    first, *rest = ffn.pieces
    row = _placed([("row", first)])
    others = _placed((piece.name, piece) for piece in rest)
    name = ffn.name.removesuffix("ffn") + "deciding"
    rows = _cut(source, ffn, "deciding", row, name=name, kind="rows")
    return [
        Target(rows, _copier(source, [(ffn, first)], row)),
        Target(
            _cut(source, ffn, "sparse", others), _copier(source, [(ffn, p) for p in rest], others)
        ),
    ]


def _copier(source: Container, old: list[tuple[Plane, Piece]], new: tuple[Piece, ...]):
    """Reads items made of pieces of planes of the source, each to its new place."""
    readers = {plane.name: PlaneReader(plane, source) for plane, _ in old}
    stride = stride_of(new)

    def read(start: int, stop: int) -> np.ndarray:
        items = np.zeros((stop - start, stride), np.uint8)
        for (plane, piece), place in zip(old, new, strict=True):
            end = place.offset + place.row_bytes
            items[:, place.offset : end] = readers[plane.name].items(piece, start, stop)
        return items

    return read
