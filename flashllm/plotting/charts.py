"""What a picture is before anybody draws it: titles, axes, named series of numbers.

A chart knows nothing of matplotlib, so that CSV and tests need none.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Axis:
    """A label with its unit; `log`: logarithmic; `names`: labels of the places 0, 1, 2, …"""

    label: str
    log: bool = False
    names: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one name.  `mark`: "line", "points", or "roof" (a limit, drawn dashed).

    `right`: belongs to the chart's right axis.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    mark: str = "line"
    right: bool = False


@dataclass(frozen=True)
class Chart:
    """`kind`: "lines" (series as they say), "bars" (series stacked over the places of x) or "map"
    (a row of colours for each series, whose y are shares, at the x of the first)."""

    title: str
    kind: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    right: Axis | None = None
    note: str = ""
    colour: str = field(default="")  # of a map: what the colours are


def rolling(values: Sequence[float], weights: Sequence[float], width: int) -> list[float]:
    """sum(values) / sum(weights) over the last `width` places of each; nan where that is 0 / 0."""
    sums = [np.concatenate(([0.0], np.cumsum(each))) for each in (values, weights)]
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - width)
    above, below = (each[stop] - each[start] for each in sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan).tolist()


def as_csv(charts: Sequence[Chart]) -> str:
    """All points, one a line: chart, series, x, x's name where it has one, y."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["chart", "series", "x", "x_name", "y", "x_label", "y_label"])
    for chart in charts:
        for series in chart.series:
            axis = chart.right if series.right and chart.right else chart.y
            for x, y in zip(series.x, series.y, strict=True):
                name = chart.x.names[int(x)] if chart.x.names else ""
                writer.writerow([chart.title, series.name, x, name, y, chart.x.label, axis.label])
    return out.getvalue()
