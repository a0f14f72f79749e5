"""Checkpoints of any finite numbers, through a conversion and back (R-29): not one bit changes, be
they denormal or a zero with a sign."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashllm import convert
from flashllm.checkpoints import open_checkpoint
from flashllm.container import verify
from flashllm.conversion.from_container import ContainerCheckpoint
from flashllm.conversion.resolve import resolve

from .tiny import GOLDEN

BITS = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}


def any_bits(shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> dict[str, np.ndarray]:
    """Any bits of finite numbers for matrices, which is what may be converted; vectors are usual
    ones."""
    rng, kind = np.random.default_rng(seed), BITS[dtype]
    made = {}
    for name, shape in shapes.items():
        values = rng.integers(0, 2 ** (8 * np.dtype(kind).itemsize), shape, kind)
        all_ones = kind(EXPONENT[dtype])
        lowest = all_ones & (~all_ones + kind(1))
        values[(values & all_ones) == all_ones] ^= lowest
        if len(shape) == 1:
            values = rng.standard_normal(shape).astype(np.float32).view(np.uint32)
            if dtype != "F32":
                shift = {"BF16": 16, "F16": 0}[dtype]
                half = rng.standard_normal(shape).astype(np.float16).view(np.uint16)
                values = (values >> shift).astype(np.uint16) if shift else half
        made[name] = values
    return made


def write(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """A safetensors file, by hand: libraries know no bits."""
    header, at = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": dtype, "shape": values.shape,
                        "data_offsets": [at, at + values.nbytes]}  # fmt: skip
        at += values.nbytes
    text = json.dumps(header).encode()
    content = b"".join(values.tobytes() for values in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def stored(checkpoint) -> dict[str, np.ndarray]:
    """Role name -> bits as they are stored."""
    return {
        tensor.names[0]: np.ascontiguousarray(
            checkpoint.stored_rows(name, 0, checkpoint.shape(name)[0])
        )
        for tensor, name in resolve(checkpoint).names.items()
    }


def test_any_bits_come_back(rounds):
    with open_checkpoint(GOLDEN / "llama-relu") as known:
        shapes = {name: known.shape(name) for name in known.names()}

    @settings(
        max_examples=rounds(8, 200), deadline=None, derandomize=rounds(True, False), database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        st.sampled_from(list(BITS)), st.sampled_from(["raw", "zstd", "planes"]),
        st.sampled_from(["split", "all"]), st.sampled_from([700, 4096, 65536]),
        st.integers(0, 2**32),
    )  # fmt: skip
    def through(dtype, codec, bundle, frame_bytes, seed) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "checkpoint"
            shutil.copytree(GOLDEN / "llama-relu", folder)
            write(folder / "model.safetensors", any_bits(shapes, dtype, seed), dtype)
            out = Path(name) / "m.flash"
            convert(folder, out, codec=codec, bundle=bundle, frame_bytes=frame_bytes)
            assert verify(out).ok
            with open_checkpoint(folder) as first, ContainerCheckpoint(out) as second:
                expected, found = stored(first), stored(second)
            assert expected.keys() == found.keys()
            for tensor, values in expected.items():
                got = found[tensor]
                if values.ndim == 1:  # float32 in a container
                    values = values.astype(np.float32) if dtype == "F16" else values
                    assert np.array_equal(np.asarray(got, np.float32), as_float32(values, dtype))
                else:
                    assert got.tobytes() == values.tobytes(), tensor

    through()


def as_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16" and values.dtype != np.float32:
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
