"""Charts of a fit: what recall costs in bundles read, and what predictors cost in memory."""

from __future__ import annotations

from ..predictors.fit import Fit
from ..units import KIB
from .charts import Axis, Chart, Series


def fit_charts(fit: Fit) -> list[Chart]:
    """Recall against bytes read, layer by layer, as measured on text nothing was fitted to."""
    series = []
    for layer in fit.layers:
        # Of `active` bundles recall x active are found among recall x active / precision read.
        points = [(r / p, 100 * r) for r, p in zip(layer.recall, layer.precision, strict=True) if p]
        series.append(Series(f"layer {layer.layer}", [x for x, _ in points],
                             [y for _, y in points]))  # fmt: skip
    layers = [layer.layer for layer in fit.layers]
    places = list(range(len(layers)))
    return [
        Chart("Recall against bytes read", "lines",
              Axis("bytes read over bytes of active bundles", least=0), Axis("recall, %", most=100),
              tuple(series), note=f"fitted to {fit.header.text_name}, measured on held-out text"),
        Chart("Predictors in memory", "bars", Axis("layer", names=tuple(map(str, layers))),
              Axis("KiB", least=0),
              (Series("section", places, [layer.n_bytes / KIB for layer in fit.layers]),)),
    ]  # fmt: skip
