"""The kinds that a .fit file may hold."""

from __future__ import annotations

from ..registry import Registry
from .low_bit import LowBitPredictor
from .low_rank import LowRankPredictor
from .scores import FittedPredictor

FITTED: Registry[type[FittedPredictor]] = Registry(
    "fitted predictor", {kind.name: kind for kind in (LowRankPredictor, LowBitPredictor)}
)
