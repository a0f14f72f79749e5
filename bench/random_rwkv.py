"""An rwkv.cpp FP16 file of any version and size with random weights, written piece by piece.

    python bench/random_rwkv.py OUT.bin --version 7 --layers 24 --hidden 2048 --active 0.1

What it takes for such a model to behave: projections of width^-0.5, decays between fast and slow,
logits with a deviation of about 2.  The channel-mix is sparse by a threshold that the architecture
has no bias for: the norm before it has a bias of 0.25 in every channel, and every row of the key
matrix a mean that this turns into -c deviations, so that a share `--active` of neurons fires, some
more often than others.  Which ones fire depends on the token; large trained models repeat theirs
more.  Names and shapes come from the family's own roles.
"""

from __future__ import annotations

import argparse
import struct
from pathlib import Path
from statistics import NormalDist

import numpy as np

from flashllm.models.rwkv_config import MIXED, RWKVConfig

BIAS = 0.25  # of the norm before the channel-mix
TABLE = 2**22  # normal deviates that all weights are cut from, at random places
RANKS = {"6": {"mix_rank": 32, "decay_rank": 64},
         "7": {"decay_rank": 96, "rate_rank": 96, "value_rank": 64, "gate_rank": 256}}  # fmt: skip
HEAD = 64


def config_of(args: argparse.Namespace) -> RWKVConfig:
    h = args.hidden
    ffn = args.ffn or (4 * h if args.version in ("4", "7") else 7 * h // 2)
    return RWKVConfig.from_hf({
        "model_type": "rwkv", "version": args.version, "vocab_size": args.vocab, "hidden_size": h,
        "intermediate_size": ffn, "num_hidden_layers": args.layers,
        "num_attention_heads": h if args.version == "4" else h // HEAD,
        **RANKS.get(args.version, {}),
    })  # fmt: skip


def shapes(config: RWKVConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every record, as that project's exporter writes them."""
    found: dict[str, tuple[int, ...]] = {}
    roles = config.roles()
    tensors = [tensor for plane in roles.planes for _, tensor in plane.tensors]
    for tensor in [*tensors, *(tensor for vector in roles.vectors for tensor in vector.parts)]:
        name, shape, last = tensor.names[0], tensor.shape, tensor.names[0].split(".")[-1]
        heads = (config.n_heads, config.head_dim)
        if ".time_maa_w2." in name:
            name, shape = name.rsplit(".", 1)[0], (len(MIXED["6"]), *shape)
        elif last in ("time_faaaa", "time_decay") and config.version in ("5.2", "6"):
            shape = (*heads, 1)
        elif last in ("time_decay", "time_first") and config.version == "5.1":
            shape = (config.n_heads, 1, 1)
        elif last == "r_k":
            shape = heads
        elif last == "x_rwkvag":
            shape = (len(MIXED["7"]), 1, config.hidden_size)
        found[name] = shape
    return found


def law(name: str, shape: tuple[int, ...], config: RWKVConfig, active: float) -> tuple:
    """("normal", mean, deviation) or ("uniform", low, high) of a tensor's values."""
    h, last, version = config.hidden_size, name.split(".")[-1], config.version
    if name.endswith("ffn.key.weight"):
        c = NormalDist().inv_cdf(1 - active)
        return "normal", -c / (BIAS * h), h**-0.5
    if name.endswith("ffn.value.weight"):
        return "normal", 0.0, 0.5 * config.intermediate_size**-0.5
    if name == "head.weight":
        return "normal", 0.0, 2 * h**-0.5
    if name == "emb.weight":
        return "normal", 0.0, 0.5
    if last == "time_decay":
        return {"4": ("uniform", -1.5, -0.01), "6": ("uniform", -6.0, -1.0)}.get(
            version, ("uniform", 0.6, 0.999)
        )
    if name.endswith("ln2.bias"):
        return "uniform", BIAS, BIAS
    if "time_maa_w2" in name:
        return "normal", 0.0, 0.1 * shape[-1] ** -0.5
    if len(shape) == 2 and last != "r_k":
        return "normal", 0.0, (0.3 if "att.output" in name else 1.0) * shape[-1] ** -0.5
    simple = {"weight": (0.8, 1.2), "bias": (-0.1, 0.1), "w0": (-3.0, 1.0), "k_a": (0.8, 1.0),
              "k_k": (0.6, 1.0), "r_k": (-0.1, 0.1), "x_k": (0.0, 0.3)}  # fmt: skip
    if last in simple:
        return "uniform", *simple[last]
    if last in ("a0", "v0", "time_first", "time_faaaa"):
        return "uniform", -1.0, 1.0
    return "uniform", 0.0, 1.0  # shares of the token before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--version", default="7", choices=MIXED)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, help="width of the channel-mix; the version's own ratio")
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--active", type=float, default=0.1, help="share of neurons that fire")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = config_of(args)
    rng = np.random.default_rng(args.seed)
    table = rng.standard_normal(TABLE, dtype=np.float32)
    uniform = rng.random(TABLE, dtype=np.float32)
    with open(args.out, "wb") as file:
        sizes = (args.vocab, args.hidden, args.layers)
        file.write(struct.pack("<I5i", 0x67676D66, 101, *sizes, 1))
        for name, shape in shapes(config).items():
            kind, a, b = law(name, shape, config, args.active)
            half = len(shape) == 2 and ".time_" not in name and not name.endswith("r_k")
            file.write(struct.pack("<3i", len(shape), len(name), int(half)))
            file.write(struct.pack(f"<{len(shape)}i", *shape[::-1]) + name.encode())
            left = int(np.prod(shape))
            while left:
                start = int(rng.integers(0, TABLE // 2))
                source = table if kind == "normal" else uniform
                part = source[start : start + min(left, TABLE // 2)]
                values = a + part * (b if kind == "normal" else b - a)
                file.write(values.astype("<f2" if half else "<f4").tobytes())
                left -= part.size
    print(f"{args.out}: {args.out.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
