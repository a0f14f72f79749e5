"""XXH64, both ways of walking its stripes, against the specification written out in Python."""

from __future__ import annotations

import numpy as np
import pytest
from flashllm._core import xxh64, xxh64_by_vectors

P1, P2, P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
P4, P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
MASK = 2**64 - 1


def _rotl(x: int, r: int) -> int:
    return (x << r | x >> (64 - r)) & MASK


def _round(acc: int, value: int) -> int:
    return _rotl((acc + value * P2) & MASK, 31) * P1 & MASK


def by_specification(data: bytes, seed: int) -> int:
    at = 0
    if len(data) >= 32:
        lanes = [(seed + P1 + P2) & MASK, (seed + P2) & MASK, seed, (seed - P1) & MASK]
        for at in range(0, len(data) // 32 * 32, 8):
            value = int.from_bytes(data[at : at + 8], "little")
            lanes[at // 8 % 4] = _round(lanes[at // 8 % 4], value)
        at += 8
        h = sum(_rotl(lane, r) for lane, r in zip(lanes, (1, 7, 12, 18), strict=True)) & MASK
        for lane in lanes:
            h = ((h ^ _round(0, lane)) * P1 + P4) & MASK
    else:
        h = (seed + P5) & MASK
    h = (h + len(data)) & MASK
    while len(data) - at >= 8:
        h = (_rotl(h ^ _round(0, int.from_bytes(data[at : at + 8], "little")), 27) * P1 + P4) & MASK
        at += 8
    if len(data) - at >= 4:
        h = _rotl(h ^ int.from_bytes(data[at : at + 4], "little") * P1 & MASK, 23) * P2 + P3 & MASK
        at += 4
    for byte in data[at:]:
        h = _rotl(h ^ byte * P5 & MASK, 11) * P1 & MASK
    h = (h ^ h >> 33) * P2 & MASK
    h = (h ^ h >> 29) * P3 & MASK
    return h ^ h >> 32


@pytest.fixture(params=[True, False], ids=["vectors", "scalar"])
def way(request):
    xxh64_by_vectors(request.param)
    yield
    xxh64_by_vectors(True)


def test_published_values(way):
    assert xxh64(b"") == 0xEF46DB3751D8E999
    assert xxh64(b"abc") == 0x44BC2CF5AD770999


def test_every_length_place_and_seed(way):
    data = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    for n in [*range(0, 140), 255, 256, 1000, 4096, 4999]:
        start, seed = n % 7, (0, 1, MASK, n * P2 & MASK)[n % 4]
        some = data[start : start + n]
        assert xxh64(some, seed) == by_specification(some, seed)
