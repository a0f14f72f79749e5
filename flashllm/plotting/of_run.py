"""Charts of one run's journal (benchmark/journal.py): over its tokens, as they came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..units import MIB
from .charts import Axis, Chart, Series, rolling

WIDTH = 16  # tokens a rolling mean looks back on
PARTS = ("wait", "decode", "submit", "attention", "predict", "ffn", "head", "python")


def run_charts(facts: Mapping[str, Any], tokens: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Hit rate and bytes, memory against the cap, and where each token's time went."""
    tokens = tokens[1:]  # the first one carries the prompt
    x = [token["token"] for token in tokens]
    ones = [1.0] * len(tokens)
    hits = [token["hits"] for token in tokens]
    wanted = [token["hits"] + token["misses"] for token in tokens]
    read = [token["bytes_read"] / MIB for token in tokens]
    axis = Axis("token")
    charts = [
        Chart(
            f"Cache: {facts['model']}", "lines", axis, Axis("hits, %", least=0, most=100),
            (Series("hit rate", x, [100 * rate for rate in rolling(hits, wanted, WIDTH)]),
             Series("read", x, rolling(read, ones, WIDTH), right=True)),
            right=Axis("MiB per token", least=0), note=f"means over the last {WIDTH} tokens",
        ),
        Chart(
            "Memory", "lines", axis, Axis("MiB", least=0),
            (Series("resident", x, [token["rss"] / MIB for token in tokens]),
             Series("cap", x, [facts["ram_budget"] / MIB] * len(x), "roof")),
        ),
    ]  # fmt: skip
    parts = [[token["parts_ms"].get(part, 0.0) for token in tokens] for part in PARTS]
    rest = [token["ms"] - sum(token["parts_ms"].values()) for token in tokens]
    series = [
        Series(part, x, rolling(values, ones, WIDTH))
        for part, values in zip((*PARTS, "other"), (*parts, rest), strict=True)
    ]
    charts.append(Chart("Where a token's time goes", "bars", axis, Axis("ms per token", least=0),
                        tuple(series), note=f"means over the last {WIDTH} tokens"))  # fmt: skip
    return charts
