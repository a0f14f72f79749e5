"""Replaying traces without weights: what policy, cache, frame size and order would cost."""

from __future__ import annotations

from .replay import Misses, Uses, frames_used, replay
from .run import Row, simulate

__all__ = ["Misses", "Row", "Uses", "frames_used", "replay", "simulate"]
