"""Memory by name: the arena, segments of slots, eviction policies and the ledger."""

from __future__ import annotations

from .arena import Arena, Region, arena_bytes
from .ledger import Ledger
from .policies import POLICIES, Policy
from .segment import Segment

__all__ = ["POLICIES", "Arena", "Ledger", "Policy", "Region", "Segment", "arena_bytes"]
