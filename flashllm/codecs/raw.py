"""raw: stored as it is.  The native readers bring such frames straight into their slots."""

from __future__ import annotations

from ..errors import CodecError
from .base import WHERE, Buffer, Codec, Decoder, Encoder


class RawEncoder(Encoder):
    def _encode(self, frame: Buffer) -> None:
        return None


class RawDecoder(Decoder):
    def _decode_into(self, stored: memoryview, out: memoryview) -> None:
        raise CodecError(WHERE, "length", f"{len(out)} bytes (raw)", f"{len(stored)} bytes")


class RawCodec(Codec):
    name = "raw"

    def encoder(self) -> RawEncoder:
        return RawEncoder()

    def decoder(self) -> RawDecoder:
        return RawDecoder()

    def decoder_bytes(self, frame_bytes: int) -> int:
        return 0
