"""Recorded activity: which bundles each token truly used, per layer (TRACES.md is the format)."""

from __future__ import annotations

from .base import LayerInfo, Trace
from .reader import read_trace
from .statistics import LayerStatistics, statistics
from .writer import TraceWriter

__all__ = ["LayerInfo", "LayerStatistics", "Trace", "TraceWriter", "read_trace", "statistics"]
