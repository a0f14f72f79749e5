"""Which bundles a token will use: contract in base.py, one file per kind, the table here."""

from __future__ import annotations

from ..registry import Registry
from .base import Predictor
from .ends import DensePredictor, OraclePredictor
from .window import WindowPredictor

PREDICTORS: Registry[type[Predictor]] = Registry(
    "predictor", {kind.name: kind for kind in (WindowPredictor, OraclePredictor, DensePredictor)}
)

__all__ = ["PREDICTORS", "DensePredictor", "OraclePredictor", "Predictor", "WindowPredictor"]
