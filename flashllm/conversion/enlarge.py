"""inflate: a small llama model becomes a container of any size with the same function.

For measuring engines on models whose answer is known; inflate.py says how, and what such a model
flatters.
"""

from __future__ import annotations

import os
from dataclasses import replace

from .convert import ConversionReport, Progress, convert
from .inflate import InflatedCheckpoint, require_inflatable
from .inflation_size import choose_inflation
from .layout import check_quant, widest
from .opening import open_source
from .resolve import resolve


def inflate(
    input: str | os.PathLike,  # noqa: A002 (as convert)
    output: str | os.PathLike,
    *,
    size_bytes: int,
    quant: str = "int8",
    codec: str = "raw",
    attention_share: float = 1 / 3,
    min_layers: int = 12,
    apart: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Converts `input` (a llama checkpoint or container) to a container of at least `size_bytes`.

    The size is met within a few per cent above.  quant, codec, overwrite, progress: as convert's,
    "keep" being the source's own type.  attention_share: of a layer's weights.  min_layers: where
    the size allows.  apart: copies of a neuron do not fire together (inflate.py).  The same
    arguments give the same file.  Errors as convert's; UnsupportedError for another family,
    UsageError for a size below the smallest inflation.
    """
    check_quant(quant)
    with open_source(input) as source:
        resolved = resolve(source)
        require_inflatable(source.path, resolved.config)
        matrices = [name for tensor, name in resolved.names.items() if len(tensor.shape) == 2]
        kept = widest([source.dtype(name) for name in matrices])
        inflation = choose_inflation(
            resolved.config,
            size_bytes,
            quant=quant,
            dtype=kept if quant == "keep" else "f32",
            attention_share=attention_share,
            min_layers=min_layers,
            seed=seed,
        )
        return convert(
            InflatedCheckpoint(source, replace(inflation, apart=apart)),
            output,
            quant=quant,
            codec=codec,
            overwrite=overwrite,
            progress=progress,
        )
