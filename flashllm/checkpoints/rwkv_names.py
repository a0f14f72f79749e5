"""What the tensors of an RWKV checkpoint are called, and what their names and shapes tell.

No RWKV file states its version or sizes: both are read off the keys.  The canonical form, which
readers hand out and roles ask for, is rwkv.cpp's, with these shapes: matrices [out, in], everything
else flat, and v6's five mixing matrices apart, as `time_maa_w2.w` and so on.
"""

from __future__ import annotations

import re

from ..errors import CheckpointError

MIXED_V6 = "wkvrg"
STACKED = "time_maa_w2"
_MATRIX = re.compile(r".*\.att\.(?:[wavg][12]|time_maa_w1|time_decay_w[12])|(?:.*\.)?\w+\.weight")

Shape = tuple[int, ...]


def version_of(names) -> str:
    """By the keys that each version brought."""
    for key, version in (
        ("att.k_k", "7"), ("att.time_maa_x", "6"), ("att.gate.weight", "5.2"),
        ("att.ln_x.weight", "5.1"),
    ):  # fmt: skip
        if f"blocks.0.{key}" in names:
            return version
    return "4"


def canonical_shape(name: str, shape: Shape) -> Shape:
    """The form in which a tensor of this name and stored shape is handed out."""
    n_values = 1
    for size in shape:
        n_values *= size
    if len(shape) == 2 and _MATRIX.fullmatch(name):
        return shape
    return (n_values,)


def config_of(path: object, shapes: dict[str, Shape]) -> dict:
    """A config.json's content for tensors of these stored `shapes`; CheckpointError for less than
    a model.  Shapes are only believed where a role compares them again."""

    def shape(name: str, n_dims: int) -> Shape:
        found = shapes.get(name)
        if found is None or len(found) < n_dims:
            what = "nothing" if found is None else list(found)
            raise CheckpointError(path, f"tensor {name!r}", f"{n_dims} dimensions", what)
        return found

    vocab_size, hidden_size = shape("emb.weight", 2)
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    n_layers = len(blocks)
    version = version_of(shapes)
    config = {
        "model_type": "rwkv",
        "version": version,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shape("blocks.0.ffn.key.weight", 2)[0],
        "num_hidden_layers": n_layers,
        "num_attention_heads": _n_heads(version, hidden_size, shape),
    }
    att, last = "blocks.0.att.", f"blocks.{n_layers - 1}.att."
    if version == "6":
        config["mix_rank"] = shape(f"{att}{STACKED}", 3)[-1]
        config["decay_rank"] = shape(f"{att}time_decay_w2", 2)[-1]
    if version == "7":
        ranks = {"decay_rank": "w2", "rate_rank": "a2", "gate_rank": "g2"}
        config |= {rank: shape(att + key, 2)[-1] for rank, key in ranks.items()}
        config["value_rank"] = shape(f"{last}v2", 2)[-1] if n_layers > 1 else 0
    return config


def _n_heads(version: str, hidden_size: int, shape) -> int:
    att = "blocks.0.att."
    if version == "4":
        return hidden_size
    if version == "7":
        return shape(f"{att}r_k", 2)[0]
    if version == "5.1":
        n_heads = 1
        for size in shape(f"{att}time_decay", 1):
            n_heads *= size
        return n_heads
    return shape(f"{att}time_faaaa", 2)[0]


def byte_vocabulary() -> dict[str, bytes]:
    """The 256 bytes as a World vocabulary: a line per token, its id, literal and length."""
    lines = [f"{byte} {bytes([byte])!r} 1\n" for byte in range(256)]
    return {"rwkv_vocab.txt": "".join(lines).encode()}
