"""Charts as PNG or SVG, through matplotlib: the only room that knows it, and only when asked."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ..errors import UnsupportedError
from .charts import Axis, Chart, Series

SUFFIXES = (".png", ".svg")
WIDTH_IN, HEIGHT_IN = 8.0, 3.6
MANY = 12  # entries of a legend beside the chart; more get none


def draw(charts: Sequence[Chart], path: str | os.PathLike) -> None:
    """Write one picture, the charts below each other; by the suffix of `path` PNG or SVG.

    UnsupportedError names the extra where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no pyplot
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            f"pictures need matplotlib ({error}): pip install 'flashllm[plot]', or ask for .csv"
        ) from None
    figure = Figure((WIDTH_IN, HEIGHT_IN * len(charts)), layout="constrained")
    FigureCanvasAgg(figure)
    for place, chart in enumerate(charts, start=1):
        axes = figure.add_subplot(len(charts), 1, place)
        _DRAWN[chart.kind](axes, chart)
        axes.set_title(chart.title, fontsize=10)
        if chart.note:
            axes.annotate(chart.note, (1, -0.2), xycoords="axes fraction", ha="right", fontsize=7)
    # No date inside: the same charts give the same file.
    kind = os.path.splitext(path)[1].lower()
    metadata = {"Date": None} if kind == ".svg" else {"Software": None}
    figure.savefig(path, dpi=130, metadata=metadata)


def _lines(axes, chart: Chart) -> None:
    right = axes.twinx() if any(series.right for series in chart.series) else None
    for number, series in enumerate(chart.series):
        target = right if series.right else axes
        _one(target, series, f"C{number % 10}")
    _axis(axes, "x", chart.x)
    _axis(axes, "y", chart.y)
    if right is not None and chart.right is not None:
        _axis(right, "y", chart.right)
    _legend(axes, right)


def _one(axes, series: Series, colour: str) -> None:
    style = {
        "line": {"marker": "o" if len(series.x) < 20 else "", "markersize": 3},
        "points": {"linestyle": "", "marker": "D", "markersize": 5},
        "roof": {"linestyle": "--", "linewidth": 1},
    }[series.mark]
    axes.plot(series.x, series.y, label=series.name, color=colour, **style)


def _bars(axes, chart: Chart) -> None:
    below = None
    for number, series in enumerate(chart.series):
        if series.mark == "points":
            axes.plot(series.x, series.y, "kD", markersize=4, label=series.name)
            continue
        below = [0.0] * len(series.x) if below is None else below
        width = 0.7 if chart.x.names else 1.0
        axes.bar(series.x, series.y, width, bottom=below, label=series.name,
                 color=f"C{number % 10}")  # fmt: skip
        below = [a + b for a, b in zip(below, series.y, strict=True)]
    _axis(axes, "x", chart.x)
    _axis(axes, "y", chart.y)
    if len(chart.series) > 1:
        _legend(axes, None)


def _map(axes, chart: Chart) -> None:
    rows = [series.y for series in chart.series]
    x = chart.series[0].x
    step = x[1] - x[0] if len(x) > 1 else 1
    extent = (x[0], x[-1] + step, len(rows) - 0.5, -0.5)
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", extent=extent, vmin=0)
    axes.figure.colorbar(image, ax=axes, label=chart.colour)
    if len(rows) <= 40:
        axes.set_yticks(range(len(rows)), [series.name for series in chart.series], fontsize=7)
    axes.set_xlabel(chart.x.label)
    axes.set_ylabel(chart.y.label)


def _axis(axes, which: str, axis: Axis) -> None:
    setters = {name: getattr(axes, f"set_{which}{name}") for name in ("label", "scale", "lim")}
    setters["label"](axis.label)
    if axis.log:
        setters["scale"]("log")
    if axis.names:
        getattr(axes, f"set_{which}ticks")(range(len(axis.names)), axis.names, fontsize=8)
    high = axis.most
    if high is None and axis.least is not None:  # room above a line that is flat
        high = getattr(axes.dataLim, f"{which}max")
    if high is not None and np.isfinite(high) and high > (axis.least or 0.0):
        setters["lim"](axis.least, high * 1.04)


def _legend(axes, right) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if right is not None:
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    if 0 < len(labels) <= MANY:
        axes.legend(handles, labels, fontsize=7, loc="best")


_DRAWN = {"lines": _lines, "bars": _bars, "map": _map}
