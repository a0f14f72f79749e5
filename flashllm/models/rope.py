"""Rotary position frequencies: which pairs turn how fast.

Source of the method: RoFormer (arXiv 2104.09864); linear interpolation (arXiv 2306.15595);
the "llama3" rule is the one published with Llama 3.1 (long wavelengths divided by `factor`, short
ones kept, a linear blend between); YaRN (arXiv 2309.00071) blends by the number of turns within the
original context and scales cos and sin; LongRoPE (arXiv 2402.13753) divides every frequency by a
number of its own.  Half-split: element i turns with element i + n_rotated/2.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import UnsupportedError
from .fields import MAX_CONTEXT, Fields

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
_SPELLINGS = {"su": "longrope"}  # as the first Phi-3 checkpoints call it
_MAX_FACTOR = 1e6


@dataclass(frozen=True, kw_only=True)
class Rope:
    """`n_rotated` of a head's dimensions turn; the other fields are as checkpoints state them.

    `attention_factor` multiplies cos and sin; `factors` (longrope) divide the frequencies.
    """

    kind: str
    theta: float
    n_rotated: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_n_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()

    def inverse_frequencies(self) -> np.ndarray:
        """float32 [n_rotated / 2]: radians per position.

        Computed in float64 and rounded once; angles are float32 products position * frequency, as
        the models were trained with.
        """
        exponents = np.arange(0, self.n_rotated, 2, dtype=np.float64) / self.n_rotated
        inverse = self.theta**-exponents
        if self.kind == "linear":
            inverse = inverse / self.factor
        elif self.kind == "longrope":
            inverse = inverse / np.array(self.factors)
        elif self.kind == "llama3":
            wavelength = 2 * math.pi / inverse
            turns = self.original_n_context / wavelength
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            inverse = _blend(inverse, keep, self.factor)
        elif self.kind == "yarn":
            inverse = _blend(inverse, self._yarn_keep(), self.factor)
        return inverse.astype(np.float32)

    def _yarn_keep(self) -> np.ndarray:
        """How far each frequency is kept: 1 above `beta_fast` turns in the original context, 0
        below `beta_slow`, linear in the pair's number between (whole numbers if `truncate`)."""

        def pair_that_turns(times: float) -> float:
            ratio = self.original_n_context / (times * 2 * math.pi)
            return self.n_rotated * math.log(ratio) / (2 * math.log(self.theta))

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.n_rotated - 1)
        width = last - first or 0.001
        return 1 - (np.arange(self.n_rotated // 2) - first) / width


def _blend(inverse: np.ndarray, keep: np.ndarray, factor: float) -> np.ndarray:
    keep = np.clip(keep, 0.0, 1.0)
    return (1 - keep) * inverse / factor + keep * inverse


def rope_from_hf(source: Fields, head_dim: int, n_context: int, *, rotated: float = 1.0) -> Rope:
    """The rope of a Hugging Face config, newer (`rope_parameters`) or older spelling.

    `rotated`: the share of a head's dimensions that turn where the config is silent.
    """
    stated = source.sub("rope_parameters") or source.sub("rope_scaling") or Fields({}, source.path)
    if any(isinstance(value, dict) for value in stated.raw.values()):
        raise UnsupportedError(f"{source.path}: a rope per kind of layer is not supported")
    kind = str(stated.get("rope_type") or stated.get("type") or "default")
    kind = _SPELLINGS.get(kind, kind)
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
    if kind in ("llama3", "yarn", "longrope"):
        key = "original_max_position_embeddings"
        home = source if source.get(key) is not None else stated
        rope["original_n_context"] = home.integer(key, 1, MAX_CONTEXT, n_context)
    if kind in ("linear", "llama3"):
        rope["factor"] = stated.number("factor", 1e-3, _MAX_FACTOR)
    elif kind != "default":
        grown = n_context / rope["original_n_context"]
        rope["factor"] = stated.number("factor", 1e-3, _MAX_FACTOR, grown)
    if kind == "llama3":
        rope["low_freq_factor"] = stated.number("low_freq_factor", 1e-6, 1e6)
        rope["high_freq_factor"] = stated.number("high_freq_factor", 1e-6, 1e6)
    elif kind == "yarn":
        rope |= _yarn(stated, rope["factor"])
    elif kind == "longrope":
        rope["factors"] = stated.numbers("short_factor", 1e-6, _MAX_FACTOR, head_dim)
        growth = math.log(max(1.0, rope["factor"])) / math.log(max(2, rope["original_n_context"]))
        usual = math.sqrt(1 + growth)
        rope["attention_factor"] = stated.number("attention_factor", 1e-6, 1e6, usual)
    return _checked(Fields(asdict(Rope(**rope)), source.path, source.error), head_dim)


def rope_growth(factor: float, times: float = 1.0) -> float:
    """YaRN's recommended scale of attention for a context `factor` times as long."""
    return 0.1 * times * math.log(max(1.0, factor)) + 1


def _yarn(stated: Fields, factor: float) -> dict[str, Any]:
    both = [stated.number(key, 0.0, 1e3, 0.0) for key in ("mscale", "mscale_all_dim")]
    usual = rope_growth(factor)
    if all(both):
        usual = rope_growth(factor, both[0]) / rope_growth(factor, both[1])
    return {
        "beta_fast": stated.number("beta_fast", 1e-6, 1e6, 32.0),
        "beta_slow": stated.number("beta_slow", 1e-6, 1e6, 1.0),
        "truncate": stated.flag("truncate", True),
        "attention_factor": stated.number("attention_factor", 1e-6, 1e6, usual),
    }


def rope_from_dict(config: Fields, head_dim: int, key: str = "rope") -> Rope:
    """The Rope under `key` of our own dictionary, every number checked."""
    return _checked(Fields(config.get(key), f"{config.path}: {key}", config.error), head_dim)


def _checked(source: Fields, head_dim: int) -> Rope:
    for key in sorted(map(str, source.raw.keys() - Rope.__dataclass_fields__.keys())):
        raise source.fail(key, "a known key", "an unknown one")
    rope = Rope(
        kind=source.text("kind"),
        theta=source.number("theta", 1.0, 1e15),
        n_rotated=source.integer("n_rotated", 0, head_dim),
        factor=source.number("factor", 1e-3, _MAX_FACTOR),
        low_freq_factor=source.number("low_freq_factor", 1e-6, 1e6),
        high_freq_factor=source.number("high_freq_factor", 1e-6, 1e6),
        original_n_context=source.integer("original_n_context", 0, MAX_CONTEXT),
        # containers of before these were known do not state them
        beta_fast=source.number("beta_fast", 1e-6, 1e6, 32.0),
        beta_slow=source.number("beta_slow", 1e-6, 1e6, 1.0),
        truncate=source.flag("truncate", True),
        attention_factor=source.number("attention_factor", 1e-6, 1e6, 1.0),
        factors=source.numbers("factors", 1e-6, _MAX_FACTOR, head_dim, ()),
    )
    if rope.kind not in ROPE_KINDS:
        raise source.fail("rope kind", " or ".join(ROPE_KINDS), rope.kind)
    if rope.n_rotated % 2:
        raise source.fail("rotated dimensions of a head", "an even number", rope.n_rotated)
    if rope.kind in ("llama3", "yarn", "longrope") and not rope.original_n_context:
        raise source.fail("rope", "the context it was trained for", "nothing")
    if rope.kind == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise source.fail("rope", "high_freq_factor above low_freq_factor", rope)
    if rope.kind == "yarn" and (rope.theta <= 1 or rope.beta_fast <= rope.beta_slow):
        raise source.fail("rope", "beta_fast above beta_slow, and a base above 1", rope)
    if len(rope.factors) != (rope.n_rotated // 2 if rope.kind == "longrope" else 0):
        raise source.fail("rope", "one factor for each pair that turns", rope.factors)
    return rope
