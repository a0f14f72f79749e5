"""Eviction policies by name.  `belady` needs the future and serves simulations only."""

from __future__ import annotations

from ...registry import Registry
from .base import Policy
from .belady import Belady
from .lfu import LFU
from .lru import LRU
from .window import Window

POLICIES: Registry[type[Policy]] = Registry(
    "cache policy", {cls.name: cls for cls in (Window, LRU, LFU, Belady)}
)

__all__ = ["POLICIES", "Policy"]
