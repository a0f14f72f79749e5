"""Codecs: bytes of a frame -> stored bytes -> the same bytes.

What a codec promises:

- `encode` never returns more than it was given.  A result as long as the frame *is* the frame:
  data that does not shrink is stored as it is, and `decode_into` copies it back.
- `decode_into(stored, out)` fills the writable buffer `out` completely or raises CodecError and
  leaves it undefined.  The expected size is `len(out)`, known from the verified index; sizes that
  the stored bytes claim are compared with it before anything is decompressed, so that no input can
  make a decoder take more than `decoder_bytes(len(out))` of memory.
- Encoders and decoders hold native state: one object per thread, kept for its lifetime.  The codec
  object itself is stateless and shared.
- Codecs know bytes, not tensors.  CodecError carries "stored frame" as its path; whoever knows the
  file and frame raises it again with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from ..errors import CodecError

Buffer = bytes | bytearray | memoryview

WHERE = "stored frame"


class Encoder(ABC):
    """One thread's encoder."""

    def encode(self, frame: Buffer) -> Buffer:
        """Stored form of `frame`; as long as `frame` means `frame` itself."""
        stored = self._encode(frame)
        return stored if stored is not None and len(stored) < len(frame) else frame

    @abstractmethod
    def _encode(self, frame: Buffer) -> bytes | None:
        """The coded form, of any length; None when this codec has no coded form."""


class Decoder(ABC):
    """One thread's decoder."""

    def decode_into(self, stored: Buffer, out: Buffer) -> None:
        """Fill the writable, C-contiguous, one-byte-item buffer `out` from `stored`.

        Raises CodecError unless `stored` is exactly one frame of `len(out)` bytes.
        """
        stored, out = memoryview(stored), memoryview(out)
        if out.readonly:
            raise TypeError("decode_into needs a writable buffer")
        if len(stored) == len(out):
            out[:] = stored
        elif not 0 < len(stored) < len(out):
            raise CodecError(WHERE, "length", f"1 to {len(out)} bytes", f"{len(stored)} bytes")
        else:
            self._decode_into(stored, out)

    @abstractmethod
    def _decode_into(self, stored: memoryview, out: memoryview) -> None:
        """Decode a frame that is shorter than `out`."""


class Codec(ABC):
    """A row of the codec table."""

    name: str

    def accepts(self, weight_types: Iterable[str]) -> bool:
        """Whether frames whose pieces have these weight types can be coded."""
        return True

    @abstractmethod
    def encoder(self) -> Encoder:
        """A new encoder for one thread."""

    @abstractmethod
    def decoder(self) -> Decoder:
        """A new decoder for one thread."""

    @abstractmethod
    def decoder_bytes(self, frame_bytes: int) -> int:
        """Most memory one decoder takes beside `stored` and `out`, for the ledger."""

    def encode(self, frame: Buffer) -> Buffer:
        """`encoder().encode(frame)`, for single frames."""
        return self.encoder().encode(frame)

    def decode_into(self, stored: Buffer, out: Buffer) -> None:
        """`decoder().decode_into(stored, out)`, for single frames."""
        self.decoder().decode_into(stored, out)
