"""Charts of a recorded trace: who is active when, and what caches of it would hit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..probe.named import CURVES
from ..simulate import simulate
from ..tracing import Trace
from ..units import MIB
from .charts import Axis, Chart, Series

COLUMNS = 200  # of the heat map, at most
CACHES = (0.05, 0.1, 0.25, 0.5, 0.75)
POLICIES = ("lru", "lfu", "belady")


def trace_charts(
    trace: Trace, *, policies: Sequence[str] = POLICIES, caches: Sequence[float] = CACHES
) -> list[Chart]:
    """The heat map of activity; hit rate, bytes per token and the speed that flash would allow
    against the size of a cache."""
    return [activity(trace), *sweeps(trace, policies, caches)]


def activity(trace: Trace) -> Chart:
    """Share of each layer's bundles that is active, a mean over neighbouring tokens."""
    width = -(-trace.n_tokens // COLUMNS)
    starts = np.arange(0, trace.n_tokens, width)
    counts = np.diff(np.append(starts, trace.n_tokens))
    series = []
    for layer, info in enumerate(trace.layers):
        first, _ = trace.active(layer)
        share = np.add.reduceat(np.diff(first), starts) / counts / info.n_bundles
        series.append(Series(info.plane, starts.tolist(), share.tolist()))
    name = f"{trace.family}, {trace.text_name}"
    return Chart(
        f"Active bundles by layer: {name}", "map", Axis(f"token (means over {width})"),
        Axis("layer"), tuple(series), colour="active share",
    )  # fmt: skip


def sweeps(trace: Trace, policies: Sequence[str], caches: Sequence[float]) -> list[Chart]:
    """Replayed by the simulator, every layer with a cache of the same share of its bundles."""
    rows = simulate(trace, policies=policies, caches=caches, per_frames=[1],
                    curves=[CURVES["default"]])  # fmt: skip
    x, hits, read, speed = Axis("cache, % of each layer", least=0), [], [], []
    for policy in policies:
        mine = [row for row in rows if row.policy == policy]
        sizes = [100 * row.cache for row in mine]
        hits.append(Series(policy, sizes, [100 * row.hit_rate for row in mine]))
        read.append(Series(policy, sizes, [row.bytes_per_token / MIB for row in mine]))
        ms = [max(row.ms["default"], 1e-6) for row in mine]
        speed.append(Series(policy, sizes, [1e3 / each for each in ms]))
    return [
        Chart("Hit rate against cache size", "lines", x, Axis("hits, %", least=0, most=100),
              tuple(hits), note="simulated, exact mode, one bundle a frame"),
        Chart("Bytes read against cache size", "lines", x, Axis("MiB per token", least=0),
              tuple(read), note="reads merged for the default device curve"),
        Chart("Speed against cache size, flash alone", "lines", x,
              Axis("tokens per second", log=True), tuple(speed),
              note="on the default device curve; computing and dense planes come on top"),
    ]  # fmt: skip
