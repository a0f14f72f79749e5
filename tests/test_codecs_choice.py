"""`auto`: the decision is a pure function, the measuring tells the truth."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from flashllm.codecs import CODECS
from flashllm.codecs.choice import CodecMeasurement, choose_codec, measure_codec

GB = 1e9
PLANES = CodecMeasurement("planes", 1.45, 2.0 * GB)
ZSTD = CodecMeasurement("zstd", 1.28, 1.5 * GB)
INT4 = CodecMeasurement("zstd", 1.11, 1.5 * GB)
INT8_GROUPS = CodecMeasurement("zstd", 1.04, 1.5 * GB)

DECISIONS = [
    # measurements, flash GB/s, cores, codec
    ([], 0.1, 2, "raw"),
    ([ZSTD, PLANES], 0.2, 2, "planes"),
    ([PLANES, ZSTD], 0.2, 2, "planes"),
    ([ZSTD, PLANES], 1.0, 2, "planes"),
    ([ZSTD, PLANES], 1.9, 2, "raw"),  # one idle core decodes no faster than the flash reads
    ([ZSTD, PLANES], 1.9, 4, "planes"),
    ([ZSTD, PLANES], 7.0, 8, "planes"),  # 8 GB/s decoded, 7 read
    ([ZSTD, PLANES], 7.5, 8, "raw"),
    ([INT4], 0.05, 2, "zstd"),
    ([INT4], 1.5, 2, "raw"),
    ([INT8_GROUPS], 0.001, 64, "raw"),  # under 1.1 on any flash
    ([CodecMeasurement("raw", 1.0, 1e12), ZSTD], 0.1, 1, "zstd"),
]


@pytest.mark.parametrize("measurements, flash, cores, expected", DECISIONS)
def test_decisions(measurements, flash, cores, expected):
    decision = choose_codec(measurements, flash_bytes_per_s=flash * GB, n_cores=cores)
    assert decision.codec == expected


def test_the_decision_says_what_it_saw():
    decision = choose_codec([ZSTD, PLANES], flash_bytes_per_s=0.5 * GB, n_cores=2)
    text = str(decision)
    assert text.startswith("planes: ")
    for part in ("zstd is 1.28x", "planes is 1.45x", "2.00 GB/s", "flash 0.50 GB/s", "1 idle"):
        assert part in text


def test_measuring_takes_the_fastest():
    frames = [np.random.default_rng(0).bytes(8192)] * 2
    ticks = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])
    measured = measure_codec("zstd", frames, clock=lambda: next(ticks))
    assert measured.ratio == pytest.approx(1.0, abs=0.01)
    assert measured.decode_bytes_per_s == pytest.approx(16384 / 2.0)


def test_real_bf16_weights():
    root = Path(os.environ.get("FLASHLLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    file = root / "models" / "hf-tinystories-656k" / "model.safetensors"
    if not file.is_file():
        pytest.skip("no real weights here")
    from safetensors import safe_open

    with safe_open(file, "np") as tensors:
        matrices = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118
    weights = np.concatenate([m.ravel() for m in matrices if m.ndim == 2]).view(np.uint32)
    assert not (weights & 0xFFFF).any()
    raw = (weights >> 16).astype("<u2").tobytes()
    frames = [raw[at : at + 32768] for at in range(0, len(raw) - 32768, 32768)]
    stored = sum(len(CODECS["planes"].encode(frame)) for frame in frames)
    assert len(frames) * 32768 / stored >= 1.45
    assert measure_codec("planes", frames).ratio >= 1.3
    assert measure_codec("zstd", frames).ratio < 1.3
