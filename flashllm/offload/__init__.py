"""Weights through a small memory: leases over planes, read ahead, on demand, or resident."""

from __future__ import annotations

from .leases import Lease
from .sizing import (
    StoreCosts,
    routed_planes,
    slot_bytes_of,
    sparse_planes,
    store_bytes,
    store_costs,
)
from .stats import StepStats
from .store import WeightStore

__all__ = [
    "Lease",
    "StepStats",
    "StoreCosts",
    "WeightStore",
    "routed_planes",
    "slot_bytes_of",
    "sparse_planes",
    "store_bytes",
    "store_costs",
]
