"""Stored frames that lie: rejected before they cost anything (R-24)."""

from __future__ import annotations

import struct

import pytest
import zstandard

from flashllm.codecs import CODECS
from flashllm.errors import CodecError

from .cheap import refused

FRAME = 65536
MIB = 2**20
MAGIC = struct.pack("<I", 0xFD2FB528)


def rle(n_bytes: int) -> bytes:
    """Blocks that stand for `n_bytes` zeros: 4 bytes per 128 KiB."""
    blocks = b""
    while n_bytes:
        n = min(n_bytes, 2**17)
        n_bytes -= n
        blocks += struct.pack("<I", n << 3 | 1 << 1 | (n_bytes == 0))[:3] + b"\0"
    return blocks


def frame(
    n_content: int | None,
    blocks: bytes,
    *,
    window: int | None = None,
    dictionary: int | None = None,
    checksum: bool = False,
) -> bytes:
    """A zstd frame from its parts (RFC 8878); a window descriptor byte, or none if None."""
    flags = 0 if n_content is None else 0b11000000
    flags |= (window is None) << 5 | checksum << 2 | (0 if dictionary is None else 3)
    raw = MAGIC + bytes([flags])
    if window is not None:
        raw += bytes([window])
    if dictionary is not None:
        raw += struct.pack("<I", dictionary)
    if n_content is not None:
        raw += struct.pack("<Q", n_content)
    return raw + blocks


GOOD = frame(FRAME, rle(FRAME))

BOMBS = {
    "declares 1 GiB, is 1 GiB": (frame(2**30, rle(2**30)), "content size"),
    "declares 64 GiB": (frame(2**36, rle(FRAME)), "content size"),
    "declares 2^64 - 2": (frame(2**64 - 2, rle(FRAME)), "content size"),
    "declares 64 KiB, is 1 GiB": (frame(FRAME, rle(2**30)), "zstd frame"),
    "declares nothing, is 1 GiB": (frame(None, rle(2**30), window=0), "content size"),
    "declares nothing, is right": (frame(None, rle(FRAME), window=0x30), "content size"),
    "declares 0": (frame(0, rle(FRAME)), "content size"),
    "one byte short": (frame(FRAME, rle(FRAME - 1)), "zstd frame"),
    "one byte long": (frame(FRAME, rle(FRAME + 1)), "zstd frame"),
    "declares one less": (frame(FRAME - 1, rle(FRAME - 1)), "content size"),
    "window of 2 GiB": (frame(FRAME, rle(FRAME), window=21 << 3), "window"),
    "largest window": (frame(FRAME, rle(FRAME), window=0xFF), "zstd"),
    "dictionary": (frame(FRAME, rle(FRAME), dictionary=77), "dictionary"),
    "own checksum": (frame(FRAME, rle(FRAME) + bytes(4), checksum=True), "checksum"),
    "skippable": (struct.pack("<II", 0x184D2A50, 100) + bytes(100), "zstd"),
    "skippable of 64 KiB": (struct.pack("<II", 0x184D2A50, FRAME) + bytes(100), "zstd"),
    "skippable first": (struct.pack("<II", 0x184D2A51, 4) + bytes(4) + GOOD, "zstd"),
    "skippable last": (GOOD + struct.pack("<II", 0x184D2A5F, 4) + bytes(4), "zstd frame"),
    "two frames": (frame(FRAME // 2, rle(FRAME // 2)) * 2, "content size"),
    "the frame twice": (GOOD * 2, "zstd frame"),
    "a byte behind": (GOOD + b"\0", "zstd frame"),
    "old format": (struct.pack("<I", 0xFD2FB527) + GOOD[4:], "zstd"),
    "not zstd": (bytes(range(256)), "zstd"),
    "reserved bit": (GOOD[:4] + bytes([GOOD[4] | 8]) + GOOD[5:], "zstd"),
    "reserved block type": (frame(FRAME, b"\x07\0\0"), "zstd frame"),
}


def rejected(name: str, stored: bytes, n_out: int) -> CodecError:
    """The error of decoding `stored`, which must come fast and without taking memory."""
    out = bytearray(n_out)
    return refused(CodecError, lambda: CODECS[name].decode_into(stored, out))


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(case):
    stored, where = BOMBS[case]
    assert where in str(rejected("zstd", stored, FRAME))


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_in_the_exponent_plane(case):
    stored, where = BOMBS[case]
    assert where in str(rejected("planes", stored + bytes(FRAME), 2 * FRAME))


def test_the_frames_made_here_would_be_right():
    out = bytearray(b"x" * FRAME)
    CODECS["zstd"].decode_into(GOOD, out)
    assert out == bytes(FRAME)


@pytest.mark.parametrize("name", ["zstd", "planes"])
def test_every_truncation(name):
    plain = bytes(range(64)) * 64
    stored = bytes(CODECS[name].encode(plain))
    for length in range(len(stored)):
        with pytest.raises(CodecError):
            CODECS[name].decode_into(stored[:length], bytearray(len(plain)))


@pytest.mark.parametrize("name", ["zstd", "planes"])
def test_flipped_bytes_decode_to_the_full_size_or_fail(name):
    """Checksums lie over stored bytes; behind them a decoder must still never overrun."""
    plain = bytes(range(64)) * 64
    stored = bytearray(CODECS[name].encode(plain))
    decoder = CODECS[name].decoder()
    arena = bytearray(len(plain) + 64)
    for at in range(len(stored)):
        for flip in (0x01, 0x80, 0xFF):
            stored[at] ^= flip
            try:
                decoder.decode_into(stored, memoryview(arena)[32:-32])
            except CodecError as error:
                assert "zstd" in str(error)
            stored[at] ^= flip
            assert not any(arena[:32]) and not any(arena[-32:])


def test_frames_of_other_encoders_are_read():
    """Levels differ, and so do encoders; the format is zstd's, not ours."""
    plain = bytes(range(200)) * 100
    for level in (-5, 1, 3, 19):
        stored = zstandard.ZstdCompressor(level=level).compress(plain)
        out = bytearray(len(plain))
        CODECS["zstd"].decode_into(stored, out)
        assert out == plain
