"""`inflate`: a llama checkpoint or container becomes a container of a wanted size, same function."""

from __future__ import annotations

import os

from ..checkpoints import Checkpoint, open_checkpoint
from ..container.header import MAGIC
from ..errors import UnsupportedError
from ..models.llama_config import LlamaConfig
from .convert import ConversionReport, Progress, convert
from .from_container import ContainerCheckpoint
from .inflate import InflatedCheckpoint
from .inflation_size import BYTES_PER_WEIGHT, choose_inflation, n_weights
from .resolve import resolve


def inflate(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    size_bytes: int,
    quant: str = "int8",
    codec: str = "raw",
    attention_share: float = 1 / 3,
    min_layers: int = 12,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write `source` (a checkpoint or a container, llama family) inflated to at least `size_bytes`.

    `quant` "keep" stores what the source's first matrix has.  `attention_share` of a layer's
    weights are attention's.  See inflate.py for the method and for what such a model does not show.
    Raises as `convert` does, and UsageError where the source is already larger.
    """
    opened = _open(source)
    try:
        resolved = resolve(opened)
        config = resolved.config
        if not isinstance(config, LlamaConfig):
            raise UnsupportedError(f"{source}: only llama models can be inflated")
        stored = opened.dtype(next(iter(resolved.names.values()))) if quant == "keep" else quant
        dtype = stored if stored in ("f16", "bf16") else "f32"
        wanted = size_bytes
        while True:  # the chooser comes near its target from either side
            inflation = choose_inflation(
                config, wanted, weight_type=stored, attention_share=attention_share,
                min_layers=min_layers, seed=seed, dtype=dtype,
            )  # fmt: skip
            inflated = InflatedCheckpoint(opened, inflation)
            if n_weights(inflated.inflated_config) * BYTES_PER_WEIGHT[stored] >= size_bytes:
                break
            wanted += max(1, size_bytes // 100)
        return convert(
            inflated, output, quant=quant, codec=codec, overwrite=overwrite, progress=progress
        )
    finally:
        opened.close()


def _open(source: str | os.PathLike) -> Checkpoint:
    """A container where the file is one, else a checkpoint; told by content."""
    if os.path.isfile(source):
        with open(source, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return ContainerCheckpoint(source)
    return open_checkpoint(source)
