"""Which inflation gives a container of a wanted size, shaped like a real model.  Pure."""

from __future__ import annotations

from dataclasses import replace

from ..errors import UsageError
from ..models.llama_config import LlamaConfig
from .inflate import Inflation, inflated_config

# Stored bytes per weight, scales included.
BYTES_PER_WEIGHT = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "int8": 34 / 32, "int4": 18 / 32}


def n_weights(config: LlamaConfig) -> int:
    """Values in all matrices."""
    total = 0
    for plane in config.roles().planes:
        total += sum(tensor.n_items * tensor.n_cols for _, tensor in plane.tensors)
    return total


def choose_inflation(
    config: LlamaConfig,
    target_bytes: int,
    *,
    weight_type: str,
    attention_share: float = 1 / 3,
    min_layers: int = 12,
    seed: int = 0,
    dtype: str = "f32",
) -> Inflation:
    """The inflation whose container of `weight_type` is about `target_bytes` large.

    The largest width that leaves at least `min_layers` layers; as many copies of neurons as of
    channels, so that the FFN keeps its shape; as many of key/value groups as make attention
    `attention_share` of a layer.  Depth comes close to the target, the neurons' copies closer.
    UsageError where even the smallest even inflation is larger.
    """
    per_weight = BYTES_PER_WEIGHT[weight_type]

    def size(inflation: Inflation) -> float:
        return n_weights(inflated_config(config, inflation)) * per_weight

    best = None
    for channels in range(2, 513, 2):
        flat = _shaped(config, channels, attention_share, seed, dtype)
        layer = (size(replace(flat, extra_layers=config.n_layers)) - size(flat)) / config.n_layers
        extra = round((target_bytes - size(flat)) / layer)
        if extra < 0 or (best and config.n_layers + extra < min_layers):
            break
        best = replace(flat, extra_layers=extra)
    if best is None:
        smallest = size(_shaped(config, 2, attention_share, seed, dtype))
        raise UsageError(f"inflation: {target_bytes} bytes are below the smallest, {smallest:.0f}")
    near = [replace(best, neurons=n) for n in range(2, best.neurons * 2 + 1, 2)]
    return min(near, key=lambda inflation: abs(size(inflation) - target_bytes))


def _shaped(
    config: LlamaConfig, channels: int, attention_share: float, seed: int, dtype: str
) -> Inflation:
    planes = {plane.name: plane for plane in config.roles().planes}
    weights = {
        name: sum(tensor.n_items * tensor.n_cols for _, tensor in plane.tensors)
        for name, plane in planes.items()
        if name.startswith("layers.0.")
    }
    attention = weights["layers.0.qkv"] + weights["layers.0.o"]
    ffn = sum(weights.values()) - attention
    wanted = channels * ffn * attention_share / ((1 - attention_share) * attention)
    kv_groups = max(2, 2 * round(wanted / 2))
    return Inflation(
        channels=channels, neurons=channels, kv_groups=kv_groups, seed=seed, dtype=dtype
    )
