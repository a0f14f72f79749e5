"""Charts of `flashllm bench -o json`: a ladder of caps as curves, bars and a roofline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import FormatError
from ..units import MIB
from .charts import Axis, Chart, Series

NEEDED = {"test", "cap", "tokens_per_s", "failed", "per_token_ms", "floor_ms", "bytes_per_token",
          "hit_rate", "facts", "cap_bytes"}  # fmt: skip


def bench_charts(path: str | os.PathLike, report: dict[str, Any]) -> list[Chart]:
    """Speed and hits against the cap, where the time of a token goes, the flash roofline.

    FormatError where the rows lack what a chart needs; refused and killed rungs are left out.
    """
    rows = report.get("rows")
    if not isinstance(rows, list) or not all(isinstance(r, dict) and r.keys() >= NEEDED
                                             for r in rows):  # fmt: skip
        raise FormatError(path, "rows", f"objects with {sorted(NEEDED)}", str(rows)[:80])
    done = [row for row in rows if not row["failed"]]
    if not done:
        raise FormatError(path, "rows", "at least one rung that ran", "none")
    charts = [against_cap(done)]
    decoded = [row for row in done if row["per_token_ms"]]
    if decoded:
        charts += [time_of_a_token(decoded), roofline(decoded)]
    return charts


def against_cap(rows: Sequence[dict[str, Any]]) -> Chart:
    """Tokens per second of each test and its hit rate, caps from small to large."""
    caps = sorted({(row["cap_bytes"] or np.inf, row["cap"]) for row in rows})
    place = {cap: i for i, (_, cap) in enumerate(caps)}
    series = []
    for test in dict.fromkeys(row["test"] for row in rows):
        mine = sorted((place[row["cap"]], row) for row in rows if row["test"] == test)
        x = [at for at, _ in mine]
        series.append(Series(f"{test}, tok/s", x, [row["tokens_per_s"] for _, row in mine]))
        hits = [(at, 100 * row["hit_rate"]) for at, row in mine if row["hit_rate"] is not None]
        if hits:
            series.append(Series(f"{test}, hits", [at for at, _ in hits], [h for _, h in hits],
                                 "points", right=True))  # fmt: skip
    names = tuple(cap for _, cap in caps)
    return Chart(
        f"Speed against the cap: {rows[0]['facts'].get('file_bytes', 0) / MIB:.0f} MiB on disk",
        "lines", Axis("cap", names=names), Axis("tokens per second", log=True), tuple(series),
        right=Axis("hits, %", least=0, most=100),
    )  # fmt: skip


def time_of_a_token(rows: Sequence[dict[str, Any]]) -> Chart:
    """Stacked parts of the mean decoded token on every rung, and the larger floor."""
    names = tuple(f"{row['cap']} {row['test']}" for row in rows)
    x = list(range(len(rows)))
    parts = list(dict.fromkeys(part for row in rows for part in row["per_token_ms"]))
    series = [Series(part, x, [row["per_token_ms"].get(part, 0.0) for row in rows])
              for part in parts]  # fmt: skip
    floors = [max(row["floor_ms"].values(), default=0.0) for row in rows]
    series.append(Series("larger floor", x, floors, "points"))
    return Chart("Where a token's time goes", "bars", Axis("", names=names),
                 Axis("ms per token", least=0), tuple(series))  # fmt: skip


def roofline(rows: Sequence[dict[str, Any]]) -> Chart:
    """Tokens per second over bytes read for each, under what the device and DRAM allow."""
    read = [max(row["bytes_per_token"] / MIB, 1e-3) for row in rows]
    low, high = min(read) / 2, max(read) * 2
    x = np.geomspace(low, high, 50)
    rate = max(row["facts"].get("device_bytes_per_s", 0.0) for row in rows) / MIB
    series = [Series(f"device, {rate:.0f} MiB/s in sequence", x.tolist(), (rate / x).tolist(),
                     "roof")]  # fmt: skip
    dram = [row["floor_ms"]["dram"] for row in rows if row["floor_ms"].get("dram")]
    if dram:
        series.append(Series("DRAM, at the bytes touched", [low, high], [1e3 / min(dram)] * 2,
                             "roof"))  # fmt: skip
    for row, bytes_read in zip(rows, read, strict=True):
        series.append(Series(f"{row['cap']} {row['test']}", [bytes_read], [row["tokens_per_s"]],
                             "points"))  # fmt: skip
    return Chart(
        "Flash roofline", "lines", Axis("MiB read per token", log=True),
        Axis("tokens per second", log=True), tuple(series),
    )  # fmt: skip
