"""The superblock (FORMAT.md section 2): 128 bytes that locate and seal everything else.

Nothing in a file is believed before `parse_superblock` has returned.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .._core import xxh64
from ..errors import FormatError, UnsupportedError
from .base import (
    ALIGNMENTS,
    MAX_FILE_BYTES,
    MAX_INDEX_BYTES,
    MAX_MANIFEST_BYTES,
    SECTION_ALIGNMENT,
    VERSION,
)

MAGIC = b"\x89FLASH\r\n"
HEADER_BYTES = 128

# magic, version, header bytes, flags, file id, file bytes, alignment, reserved, index offset,
# index bytes, manifest bytes, index sha256, reserved; then the checksum of these.
_FIELDS = struct.Struct("<8sIIQQQIIQQQ32s16s")
_CHECKSUM = struct.Struct("<Q")
assert _FIELDS.size + _CHECKSUM.size == HEADER_BYTES


@dataclass(frozen=True)
class Superblock:
    file_id: int
    file_bytes: int
    alignment: int
    index_offset: int
    index_bytes: int
    manifest_bytes: int
    index_sha256: bytes

    def pack(self) -> bytes:
        head = _FIELDS.pack(
            MAGIC,
            VERSION,
            HEADER_BYTES,
            0,
            self.file_id,
            self.file_bytes,
            self.alignment,
            0,
            self.index_offset,
            self.index_bytes,
            self.manifest_bytes,
            self.index_sha256,
            bytes(16),
        )
        return head + _CHECKSUM.pack(xxh64(head))


def parse_superblock(path: object, raw: bytes, *, file_bytes: int) -> Superblock:
    """The superblock in the file's first bytes, or FormatError; `file_bytes` is the real size.

    UnsupportedError for a well-formed file of another version.
    """

    def expect(where: str, good: bool, expected: object, found: object) -> None:
        if not good:
            raise FormatError(path, where, expected, found)

    magic = raw[: len(MAGIC)]
    expect("magic", magic == MAGIC, MAGIC, magic)
    expect("superblock", len(raw) == HEADER_BYTES, f"{HEADER_BYTES} bytes", f"{len(raw)} bytes")
    (
        _,
        version,
        header_bytes,
        flags,
        file_id,
        stated_bytes,
        alignment,
        reserved,
        index_offset,
        index_bytes,
        manifest_bytes,
        index_sha256,
        spare,
    ) = _FIELDS.unpack_from(raw)
    # Before the checksum: another version may have another checksum.
    if version != VERSION:
        raise UnsupportedError(f"{path}: container version {version}; supported: {VERSION}")
    (stated,) = _CHECKSUM.unpack_from(raw, _FIELDS.size)
    found = xxh64(raw[: _FIELDS.size])
    expect("superblock checksum", stated == found, f"{stated:016x}", f"{found:016x}")
    expect("header bytes", header_bytes == HEADER_BYTES, HEADER_BYTES, header_bytes)
    expect("flags", flags == 0, 0, hex(flags))
    expect("reserved", reserved == 0 and spare == bytes(16), "zeros", "something else")
    expect("alignment", alignment in ALIGNMENTS, f"one of {ALIGNMENTS}", alignment)
    expect("file bytes", stated_bytes <= MAX_FILE_BYTES, f"at most {MAX_FILE_BYTES}", stated_bytes)
    expect("file size", stated_bytes == file_bytes, f"{stated_bytes} bytes", f"{file_bytes} bytes")
    placed = index_offset >= SECTION_ALIGNMENT and index_offset % SECTION_ALIGNMENT == 0
    expect("index offset", placed, f"a multiple of {SECTION_ALIGNMENT}", index_offset)
    bounded = index_bytes <= MAX_INDEX_BYTES
    expect("index bytes", bounded, f"at most {MAX_INDEX_BYTES}", index_bytes)
    end = index_offset + index_bytes
    expect("index", end == file_bytes, f"to end at {file_bytes}", f"an end at {end}")
    most = min(index_bytes, MAX_MANIFEST_BYTES)
    expect("manifest bytes", 2 <= manifest_bytes <= most, f"2 to {most}", manifest_bytes)
    return Superblock(
        file_id, stated_bytes, alignment, index_offset, index_bytes, manifest_bytes, index_sha256
    )
