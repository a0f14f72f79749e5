"""How a model is cut into planes, pieces and frames.  Pure: roles and sizes in, a plan out.

Nothing here reads or writes; the caller owns every default.  The trade-offs:
- dense planes stream in file order, so frames only need to be large (256 KiB) against the index;
- an untied embedding is read a row at a time: 64 KiB bounds what one token over-reads;
- sparse bundles are read where they are active: frames of at least 16 KiB, because a smaller read
  costs the device the same operation; coded ones at least 64 KiB, below which codecs lose ratio;
- experts are read whole: frames as large as dense ones, none of which straddles two experts;
- alignment 4096 suits any device; where padding would waste more than 6 %, 512.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..codecs.choice import LEAST_RATIO, CodecMeasurement
from ..codecs.choice import choose_codec as decide
from ..codecs.planes import SIXTEEN_BIT
from ..container.base import MAX_FRAME_BYTES, Piece, PlaneShape, lay_out_pieces
from ..errors import UsageError
from ..models.base import PlaneRole
from ..units import KIB, align_up

QUANTS = ("keep", "f32", "f16", "bf16", "int8", "int4")
DENSE_FRAME_BYTES = 256 * KIB
EMBED_FRAME_BYTES = 64 * KIB
SPARSE_FRAME_BYTES = 16 * KIB
CODED_FRAME_BYTES = 64 * KIB
MAX_WASTE = 0.06
ALIGNMENTS = (4096, 512)

# Decoded bytes per second of one core, measured on a 2-core x86-64 machine; constants, so that the
# same conversion decides the same way every time and a killed one can be taken up.
DECODE_BYTES_PER_S = {"planes": 2.1e9, "zstd": 1.5e9}
DECODING_CORES = 2


@dataclass(frozen=True)
class PlanePlan:
    """A plane to be written: `tensors` are the checkpoint names, in the order of `role.tensors`."""

    role: PlaneRole
    shape: PlaneShape
    tensors: tuple[str, ...]

    @property
    def decoded_bytes(self) -> int:
        return self.shape.n_frames * self.shape.frame_bytes


def widest(dtypes: list[str]) -> str:
    """The float type that holds every value of all `dtypes` (f64 is rounded to f32)."""
    kinds = set(dtypes)
    return kinds.pop() if len(kinds) == 1 and kinds <= {"f16", "bf16", "f32"} else "f32"


def weight_type(role: PlaneRole, quant: str, stored: str) -> str:
    """The weight type of a piece whose tensors have the float type `stored`.

    Embedding and head stay at int8 under int4: as int4 they raise perplexity by another 0.6 to
    1.9 % (three small trained models), which is as much as a quarter of what int4 costs in all the
    other planes.  Learned positions, and low-rank matrices (PlaneRole.keeps_type), are a hundredth
    of a model at most and keep their type.  A router is float32: it is as small, and a rounded one
    sends tokens to other experts.
    """
    if role.use == "router":
        return "f32"
    if quant == "keep" or role.keeps_type or role.name == "position":
        return stored
    if quant == "int4" and role.name in ("embed", "head"):
        return "int8"
    return quant


def lay_out_plane(
    role: PlaneRole, dtypes: Mapping[str, list[str]], quant: str
) -> tuple[tuple[Piece, ...], dict[str, tuple[int, int]]]:
    """Pieces of an item and named parts; `dtypes`: part or piece name -> stored float types."""
    if role.kind == "bundles":
        pieces = [
            (name, weight_type(role, quant, widest(dtypes[name])), tensor.n_cols)
            for name, tensor in role.groups()[0]
        ]
        return lay_out_pieces(pieces), {}
    row_type = weight_type(role, quant, widest([t for types in dtypes.values() for t in types]))
    parts, start = {}, 0
    for name, tensor in role.tensors:
        parts[name] = (start, start + tensor.n_items)
        start += tensor.n_items
    pieces = lay_out_pieces([("row", row_type, role.tensors[0][1].n_cols)])
    return pieces, parts if len(parts) > 1 else {}


def stride_of(pieces: tuple[Piece, ...]) -> int:
    return align_up(pieces[-1].offset + pieces[-1].row_bytes, 16)


def target_frame_bytes(use: str, coded: bool) -> int:
    """What a frame of a plane read in this way should hold."""
    if use == "sparse":
        return CODED_FRAME_BYTES if coded else SPARSE_FRAME_BYTES
    return EMBED_FRAME_BYTES if use == "embed" else DENSE_FRAME_BYTES


def items_per_frame(
    stride: int, n_items: int, *, target_bytes: int, at_least: bool, alignment: int
) -> int:
    """Items in a frame of about (or `at_least`) `target_bytes`, wasting the fewest bytes: padding
    of every frame, and zeros in the last, which is as large as the others."""
    most = max(1, min(n_items, MAX_FRAME_BYTES // stride))
    if at_least:
        low, high = -(-target_bytes // stride), -(-3 * target_bytes // (2 * stride))
    else:
        low, high = -(-3 * target_bytes // (4 * stride)), 5 * target_bytes // (4 * stride)
    low = min(max(low, 1), most)
    high = min(max(high, low), most)
    wanted = low if at_least else min(max(target_bytes // stride, low), high)

    def cost(n: int) -> tuple[int, int]:
        return -(-n_items // n) * align_up(n * stride, alignment), abs(n - wanted)

    return min(range(low, high + 1), key=cost)


def items_per_expert_frame(stride: int, n_each: int, target_bytes: int) -> int:
    """The divisor of an expert's `n_each` items whose frames come nearest to `target_bytes`."""

    def distance(n: int) -> float:
        return max(n * stride, target_bytes) / min(n * stride, target_bytes)

    fitting = [n for n in range(2, n_each + 1) if n_each % n == 0 and n * stride <= MAX_FRAME_BYTES]
    return min([1, *fitting], key=distance)


def fewest_bundles(stride: int, n_items: int) -> int:
    """Bundles in a frame of a plane whose bundles are picked: one, or as few as padding allows.

    Not a matter of the device: over curves from NVMe to SD cards frames of one cost least, in any
    order (docs/SPARSITY.md), because neighbours that are wanted are read together anyway and gaps
    are read through where the curve says so, while what a frame adds is read wanted or not.
    """
    most = max(1, min(n_items, MAX_FRAME_BYTES // stride))
    for n in range(1, most):
        if padding(n * stride, ALIGNMENTS[-1]) <= MAX_WASTE * n * stride:
            return n
    return most


def padding(n_bytes: int, alignment: int) -> int:
    return align_up(n_bytes, alignment) - n_bytes


def cut(
    name: str,
    kind: str,
    use: str,
    n_items: int,
    pieces: tuple[Piece, ...],
    parts: dict[str, tuple[int, int]],
    *,
    codec: str,
    alignment: int,
    frame_bytes: int | None,
    n_each: int | None = None,
) -> PlaneShape:
    """The plane with its frames chosen; `frame_bytes` overrides the target for experiments.

    `n_each`: the items of one expert, where `use` is "experts".
    """
    coded = codec != "raw"
    target_bytes = frame_bytes or target_frame_bytes(use, coded)
    if use == "experts":
        per_frame = items_per_expert_frame(stride_of(pieces), n_each or n_items, target_bytes)
    else:
        per_frame = items_per_frame(
            stride_of(pieces),
            n_items,
            target_bytes=target_bytes,
            at_least=use == "sparse" and frame_bytes is None,
            alignment=1 if coded else alignment,
        )
    return PlaneShape(name, kind, n_items, per_frame, codec, pieces, parts)


def wasted_share(shapes: list[PlaneShape], alignment: int) -> float:
    """Padding between frames as a share of the frames' bytes (half an alignment where coded)."""
    lost = kept = 0
    for shape in shapes:
        each = padding(shape.frame_bytes, alignment)
        lost += shape.n_frames * (each if shape.codec == "raw" else alignment // 2)
        kept += shape.n_frames * shape.frame_bytes
    return lost / kept if kept else 0.0


def choose_codec(
    use: str,
    types: set[str],
    ratios: Mapping[str, float],
    *,
    flash_bytes_per_s: float | None,
    decode_bytes_per_s: Mapping[str, float] = DECODE_BYTES_PER_S,
) -> tuple[str, str]:
    """(codec of a group of planes, why), from the measured ratios of `planes` and `zstd`.

    What is read piecemeal stays raw: single bundles and rows are bound by operations, not bytes,
    and coded frames would have to be larger.  With a known flash rate codecs/choice.py decides;
    without one exponent planes of 16-bit floats are coded and nothing else, because quantised
    weights hardly shrink and zstd over float32 decodes no faster than flash reads.
    """
    codec = "planes" if types <= SIXTEEN_BIT else "zstd"
    ratio = ratios.get(codec, 1.0)
    if use in ("sparse", "embed"):
        return "raw", "read piecemeal: bound by operations, not bytes"
    if flash_bytes_per_s is None:
        pays = codec == "planes" and ratio >= LEAST_RATIO
        return (codec if pays else "raw"), f"{codec} is {ratio:.2f}x smaller; flash not probed"
    measured = CodecMeasurement(codec, ratio, decode_bytes_per_s[codec])
    decision = decide([measured], flash_bytes_per_s=flash_bytes_per_s, n_cores=DECODING_CORES)
    return decision.codec, decision.reason


def check_quant(quant: str) -> None:
    if quant not in QUANTS:
        raise UsageError(f"unknown quant {quant!r}; known: {', '.join(QUANTS)}")
