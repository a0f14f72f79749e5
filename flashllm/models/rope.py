"""Rotary position frequencies: which pairs turn how fast.

Source of the method: RoFormer (arXiv 2104.09864); linear interpolation (arXiv 2306.15595);
the "llama3" rule is the one published with Llama 3.1 (long wavelengths divided by `factor`, short
ones kept, a linear blend between).  Half-split: element i turns with element i + n_rotated/2.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from ..errors import UnsupportedError
from .fields import MAX_CONTEXT, Fields

ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """`n_rotated` of a head's dimensions turn; the other fields are as checkpoints state them."""

    kind: str
    theta: float
    n_rotated: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_n_context: int = 0

    def inverse_frequencies(self) -> np.ndarray:
        """float32 [n_rotated / 2]: radians per position.

        Computed in float64 and rounded once; angles are float32 products position * frequency, as
        the models were trained with.
        """
        exponents = np.arange(0, self.n_rotated, 2, dtype=np.float64) / self.n_rotated
        inverse = self.theta**-exponents
        if self.kind == "linear":
            inverse = inverse / self.factor
        elif self.kind == "llama3":
            wavelength = 2 * math.pi / inverse
            turns = self.original_n_context / wavelength
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = np.clip(keep, 0.0, 1.0)
            inverse = (1 - keep) * inverse / self.factor + keep * inverse
        return inverse.astype(np.float32)


def rope_from_hf(source: Fields, head_dim: int, n_context: int, *, rotated: float = 1.0) -> Rope:
    """The rope of a Hugging Face config, newer (`rope_parameters`) or older spelling.

    `rotated`: the share of a head's dimensions that turn where the config is silent.
    """
    stated = source.sub("rope_parameters") or source.sub("rope_scaling") or Fields({}, source.path)
    if any(isinstance(value, dict) for value in stated.raw.values()):
        raise UnsupportedError(f"{source.path}: a rope per kind of layer is not supported")
    kind = str(stated.get("rope_type") or stated.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise UnsupportedError(
            f"{source.path}: rope type {kind!r} is not supported; known: {', '.join(ROPE_KINDS)}"
        )
    theta_home = stated if stated.get("rope_theta") is not None else source
    partial_home = stated if stated.get("partial_rotary_factor") is not None else source
    share = partial_home.number("partial_rotary_factor", 0.0, 1.0, rotated)
    rope = {
        "kind": kind,
        "theta": theta_home.number("rope_theta", 1.0, 1e15, 10000.0),
        "n_rotated": int(head_dim * share),
    }
    if kind != "default":
        rope["factor"] = stated.number("factor", 1e-3, 1e6)
    if kind == "llama3":
        rope["low_freq_factor"] = stated.number("low_freq_factor", 1e-6, 1e6)
        rope["high_freq_factor"] = stated.number("high_freq_factor", 1e-6, 1e6)
        rope["original_n_context"] = stated.integer(
            "original_max_position_embeddings", 1, MAX_CONTEXT, n_context
        )
    return _checked(Fields(asdict(Rope(**rope)), source.path, source.error), head_dim)


def rope_from_dict(config: Fields, head_dim: int, key: str = "rope") -> Rope:
    """The inverse of Rope.to_dict under `key` of our own dictionary, every number checked."""
    return _checked(Fields(config.get(key), f"{config.path}: {key}", config.error), head_dim)


def _checked(source: Fields, head_dim: int) -> Rope:
    for key in sorted(map(str, source.raw.keys() - Rope.__dataclass_fields__.keys())):
        raise source.fail(key, "a known key", "an unknown one")
    rope = Rope(
        kind=source.text("kind"),
        theta=source.number("theta", 1.0, 1e15),
        n_rotated=source.integer("n_rotated", 0, head_dim),
        factor=source.number("factor", 1e-3, 1e6),
        low_freq_factor=source.number("low_freq_factor", 1e-6, 1e6),
        high_freq_factor=source.number("high_freq_factor", 1e-6, 1e6),
        original_n_context=source.integer("original_n_context", 0, MAX_CONTEXT),
    )
    if rope.kind not in ROPE_KINDS:
        raise source.fail("rope kind", " or ".join(ROPE_KINDS), rope.kind)
    if rope.n_rotated % 2:
        raise source.fail("rotated dimensions of a head", "an even number", rope.n_rotated)
    if rope.kind == "llama3" and not (
        rope.high_freq_factor > rope.low_freq_factor and rope.original_n_context
    ):
        raise source.fail("rope", "high_freq_factor above low_freq_factor", rope)
    return rope
