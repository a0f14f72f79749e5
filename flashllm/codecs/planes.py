"""planes: 16-bit floats split into a coded exponent plane and a raw plane of mantissa and sign.

Mantissa and sign of trained weights are noise, exponents are not: coding only the exponent byte has
a better ratio than zstd over whole values (real bf16 weights: 1.50 against 1.28) and decodes half
the bytes.  `split16` and `join16` here are the NumPy truth of the ones in ext/fl_planes.c.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .. import _core
from ..errors import CodecError
from .base import WHERE, Buffer, Codec, Decoder, Encoder
from .zstd import ZstdCodec, decompress, new_compressor

SIXTEEN_BIT = frozenset({"f16", "bf16"})


def split16(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint16[n] -> (high uint8[n], low uint8[n]) of each value rotated left by one bit."""
    rotated = (values << np.uint16(1)) | (values >> np.uint16(15))
    return (rotated >> np.uint16(8)).astype(np.uint8), rotated.astype(np.uint8)


def join16(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The inverse of `split16`."""
    rotated = high.astype(np.uint16) << np.uint16(8) | low
    return (rotated >> np.uint16(1)) | (rotated << np.uint16(15))


class PlanesEncoder(Encoder):
    def __init__(self) -> None:
        self._compressor = new_compressor()

    def _encode(self, frame: Buffer) -> bytes | None:
        if len(frame) % 2:
            return None
        planes = np.empty(len(frame), np.uint8)
        high, low = planes[: len(frame) // 2], planes[len(frame) // 2 :]
        _core.planes_split16(frame, high, low)
        return self._compressor.compress(high) + low.tobytes()


class PlanesDecoder(Decoder):
    def __init__(self) -> None:
        import zstandard

        self._decompressor = zstandard.ZstdDecompressor()

    def _decode_into(self, stored: memoryview, out: memoryview) -> None:
        n_values, odd = divmod(len(out), 2)
        n_coded = len(stored) - n_values
        if odd or n_coded <= 0:
            raise CodecError(
                WHERE, "planes", f"an even frame with {n_values} low bytes", f"{len(stored)} bytes"
            )
        high = decompress(self._decompressor, stored[:n_coded], n_values)
        _core.planes_join16(high, stored[n_coded:], out)


class PlanesCodec(Codec):
    name = "planes"

    def accepts(self, weight_types: Iterable[str]) -> bool:
        return SIXTEEN_BIT.issuperset(weight_types)

    def encoder(self) -> PlanesEncoder:
        return PlanesEncoder()

    def decoder(self) -> PlanesDecoder:
        return PlanesDecoder()

    def decoder_bytes(self, frame_bytes: int) -> int:
        return ZstdCodec().decoder_bytes(frame_bytes // 2)
