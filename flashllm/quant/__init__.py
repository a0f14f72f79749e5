"""Weight types: the table and nothing else.  Adding one: a file, a line here, C kernels."""

from __future__ import annotations

from ..registry import Registry
from .base import GROUP, WeightType
from .floats import BF16, F16, F32
from .int4 import Int4
from .int8 import Int8

WEIGHT_TYPES: Registry[WeightType] = Registry(
    "weight type", {t.name: t for t in (F32(), F16(), BF16(), Int8(), Int4())}
)
BY_CODE: dict[int, WeightType] = {t.code: t for _, t in WEIGHT_TYPES.items()}

__all__ = ["BY_CODE", "GROUP", "WEIGHT_TYPES", "WeightType"]
