"""Which inflation gives a container of a wanted size, shaped like a real model.  Pure."""

from __future__ import annotations

from dataclasses import replace

from ..container.base import SECTION_ALIGNMENT
from ..errors import UsageError
from ..models.fields import MAX_LAYERS
from ..models.llama_config import LlamaConfig
from .inflate import Inflation, inflated_config
from .layout import lay_out_plane, stride_of


def container_bytes(config: LlamaConfig, quant: str, stored: str) -> int:
    """Bytes of a container of matrices stored as `stored` and converted with `quant`, nearly."""
    total = 0
    for role in config.roles().planes:
        pieces, _ = lay_out_plane(role, {name: [stored] for name, _ in role.tensors}, quant)
        total += role.n_items * stride_of(pieces) + SECTION_ALIGNMENT // 2
    return total


def choose_inflation(
    config: LlamaConfig,
    target_bytes: int,
    *,
    quant: str,
    dtype: str = "f32",
    attention_share: float = 1 / 3,
    min_layers: int = 12,
    seed: int = 0,
) -> Inflation:
    """The inflation whose container is `target_bytes` large, or little more.

    The largest width that leaves at least `min_layers` layers; as many copies of neurons as of
    channels, so that the FFN keeps its shape; as many of key/value groups as make attention
    `attention_share` of a layer.  Depth comes close to the target, the neurons' copies closer.
    UsageError where even the smallest even inflation is larger, and where the widest is too deep.
    """

    def size(inflation: Inflation) -> int:
        return container_bytes(inflated_config(config, inflation), quant, dtype)

    best = None
    for channels in range(2, 513, 2):
        flat = _shaped(config, channels, attention_share, seed, dtype)
        deep = _deep_enough(flat, config.n_layers, target_bytes, size)
        if deep is None or (best and config.n_layers + deep.extra_layers < min_layers):
            break
        best = deep
    if best is None:
        smallest = size(_shaped(config, 2, attention_share, seed, dtype))
        raise UsageError(f"inflation: {target_bytes} bytes are below the smallest, {smallest}")
    # A little more or less FFN fits the size better than whole layers do.
    low, high = max(2, best.channels * 3 // 8 * 2), best.channels * 5 // 8 * 2
    near = [replace(best, neurons=n, extra_layers=0) for n in range(low, high + 1, 2)]
    fitted = [_deep_enough(flat, config.n_layers, target_bytes, size) for flat in near]
    least, most = min(best.extra_layers, min_layers - config.n_layers), MAX_LAYERS - config.n_layers
    deep = [it for it in fitted if it and least <= it.extra_layers <= most]
    if not deep:
        raise UsageError(f"inflation: {target_bytes} bytes take more than {MAX_LAYERS} layers")
    return min(deep, key=size)


def _deep_enough(flat: Inflation, n_layers: int, target_bytes: int, size) -> Inflation | None:
    """`flat` with the fewest extra layers that reach the target; None if it is larger by itself."""
    lacking = target_bytes - size(flat)
    if lacking < 0:
        return None
    per_layer = (size(replace(flat, extra_layers=n_layers)) - size(flat)) // n_layers
    return replace(flat, extra_layers=-(-lacking // per_layer))


def _shaped(
    config: LlamaConfig, channels: int, attention_share: float, seed: int, dtype: str
) -> Inflation:
    planes = config.roles().planes
    weights = {
        plane.name: sum(tensor.n_items * tensor.n_cols for _, tensor in plane.tensors)
        for plane in planes
        if plane.name.startswith("layers.0.")
    }
    attention = weights["layers.0.qkv"] + weights["layers.0.o"]
    ffn = sum(weights.values()) - attention
    wanted = channels * ffn * attention_share / ((1 - attention_share) * attention)
    kv_groups = max(2, 2 * round(wanted / 2))
    return Inflation(
        channels=channels, neurons=channels, kv_groups=kv_groups, seed=seed, dtype=dtype
    )
