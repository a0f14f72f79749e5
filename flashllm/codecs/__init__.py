"""The codec table.  To add one: a file beside this, a class with its name, a line here, and a line
in section 8 of container/FORMAT.md."""

from __future__ import annotations

from ..registry import Registry
from .base import Codec, Decoder, Encoder
from .planes import PlanesCodec
from .raw import RawCodec
from .zstd import ZstdCodec

CODECS: Registry[Codec] = Registry(
    "codec", {codec.name: codec for codec in (RawCodec(), ZstdCodec(), PlanesCodec())}
)

__all__ = ["CODECS", "Codec", "Decoder", "Encoder"]
