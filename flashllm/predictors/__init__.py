"""Which bundles a token will use: contract in base.py, one file per kind, the table here."""

from __future__ import annotations

from ..registry import Registry
from .base import Predictor
from .ends import DensePredictor, OraclePredictor
from .fit import Fit, fit_path, open_fit
from .kinds import FITTED
from .window import WindowPredictor

PREDICTORS: Registry[type[Predictor]] = Registry(
    "predictor",
    {kind.name: kind for kind in (WindowPredictor, OraclePredictor, DensePredictor)}
    | dict(FITTED.items()),
)

__all__ = [
    "FITTED",
    "PREDICTORS",
    "DensePredictor",
    "Fit",
    "OraclePredictor",
    "Predictor",
    "WindowPredictor",
    "fit_path",
    "open_fit",
]
