"""Which codec pays: a pure decision from measurements, and the measuring.

Reading a plane raw takes 1/F seconds a byte (F: the flash).  Coded, r times fewer bytes are read
while k cores decode at D bytes a second each; read and decode overlap, so it takes the longer of
1/(r F) and 1/(k D), and the gain is min(r, k D / F).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from . import CODECS

# Below this a codec costs more in trouble (decoding threads, decoders' memory) than it brings.
LEAST_RATIO = LEAST_GAIN = 1.1
# While weights stream in, computing on them takes about half of the cores' time.
IDLE_SHARE = 0.5


@dataclass(frozen=True)
class CodecMeasurement:
    """What a codec did to sample frames: decoded bytes per byte in the file (padding included), and
    decoded bytes per second on one core."""

    codec: str
    ratio: float
    decode_bytes_per_s: float


@dataclass(frozen=True)
class CodecDecision:
    codec: str
    reason: str

    def __str__(self) -> str:
        return f"{self.codec}: {self.reason}"


def choose_codec(
    measurements: Iterable[CodecMeasurement], *, flash_bytes_per_s: float, n_cores: int
) -> CodecDecision:
    """The codec with which a plane streams fastest; raw unless another is worth it.

    `flash_bytes_per_s` is what the device gives for reads of these frames' size.
    """
    idle = n_cores * IDLE_SHARE
    flash = flash_bytes_per_s / 1e9
    best, best_gain, seen = "raw", LEAST_GAIN, []
    for measured in measurements:
        if measured.codec == "raw":
            continue
        speed = measured.decode_bytes_per_s / 1e9
        gain = min(measured.ratio, idle * speed / flash)
        seen.append(
            f"{measured.codec} is {measured.ratio:.2f}x smaller, decodes {speed:.2f} GB/s a core, "
            f"gains {gain:.2f}x"
        )
        if measured.ratio >= LEAST_RATIO and gain >= best_gain:
            best, best_gain = measured.codec, gain
    found = "; ".join(seen) or "no other codec fits"
    why = f"{found}; flash {flash:.2f} GB/s, {idle:g} idle cores, least gain {LEAST_GAIN}"
    return CodecDecision(best, why)


def measure_codec(
    codec: str,
    frames: Sequence[bytes],
    *,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> CodecMeasurement:
    """Encode and decode sample `frames`; the fastest of `repeats` decodings counts."""
    encoder, decoder = CODECS[codec].encoder(), CODECS[codec].decoder()
    stored = [bytes(encoder.encode(frame)) for frame in frames]
    out = memoryview(bytearray(max(map(len, frames))))
    seconds = []
    for _ in range(repeats):
        start = clock()
        for data, frame in zip(stored, frames, strict=True):
            decoder.decode_into(data, out[: len(frame)])
        seconds.append(clock() - start)
    plain, coded = sum(map(len, frames)), sum(map(len, stored))
    return CodecMeasurement(codec, plain / coded, plain / max(min(seconds), 1e-9))
