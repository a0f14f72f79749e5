"""What decoding may leave out: where its predictors or thresholds come from, checked against the
container before anything is planned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..container import Container
from ..errors import FormatError, UsageError
from ..offload import sparse_planes
from ..predictors import Predictor
from ..predictors.fit import Fit, fit_extents, fit_path, open_fit
from ..predictors.magnitude import density_path, read_magnitudes
from .wishes import Wishes


@dataclass(frozen=True)
class Predicting:
    """What decoding leaves out, as a plan sees it: predictors (of which layers, how many bytes, and
    how to load them), or thresholds of magnitude by layer."""

    layers: tuple[int, ...] = ()
    n_bytes: int = 0
    load: Callable[[], Mapping[int, Predictor]] = dict
    thresholds: Mapping[int, float] = field(default_factory=dict)

    def planes(self) -> set[str]:
        return {f"layers.{i}.{part}" for i in self.layers for part in ("deciding", "ffn")}


def predicting(
    path: str,
    container: Container,
    config: Any,
    kernels: Any,
    wishes: Wishes,
    predictors: Mapping[int, Predictor] | None,
) -> Predicting | None:
    """What names the neurons that decoding computes: nothing (None) in exact mode; in approximate
    mode the `predictors` given, or those fitted to this container; or, where no neuron is ever
    exactly zero, thresholds for the density asked for."""
    if wishes.mode == "exact":
        if predictors:
            raise UsageError("predictors decide nothing in exact mode: ask for mode approx")
        return None
    if not config.sparse:
        return Predicting(thresholds=_thresholds(path, container, config, wishes, predictors))
    if wishes.density is not None:
        raise UsageError(f"{container.path}: density is for models without exact zeros; with "
                         f"{config.activation} ask for a recall")
    sizes = {
        i: plane.n_items for i in range(config.n_layers)
        if (plane := container.planes.get(f"layers.{i}.ffn")) is not None
    }  # fmt: skip
    if predictors is None:
        fit = find_fit(path, container)
        fit.require_shape(config.hidden_size, sizes)
        fit.place(wishes.recall)
        return Predicting(
            tuple(layer.layer for layer in fit.layers), fit.resident_bytes,
            lambda: fit.load(kernels, wishes.recall),
        )  # fmt: skip
    for layer, predictor in predictors.items():
        if layer not in sizes:
            raise UsageError(f"a predictor for layer {layer}, which has no FFN of neurons")
        if predictor.n_bundles != sizes[layer]:
            raise UsageError(f"the predictor of layer {layer} knows {predictor.n_bundles} bundles, "
                             f"the layer has {sizes[layer]}")
    n_bytes = sum(predictor.resident_bytes for predictor in predictors.values())
    return Predicting(tuple(predictors), n_bytes, lambda: predictors)


def _thresholds(path, container, config, wishes: Wishes, predictors) -> dict[int, float]:
    """Layer -> threshold of a model whose neurons are never exactly zero."""
    if wishes.density is None or predictors:
        raise UsageError(
            f"{container.path}: with {config.activation} no neuron is exactly zero: approximate "
            "mode needs a density (flashllm fit --density finds its thresholds), not a recall"
        )
    found = read_magnitudes(density_path(path))
    found.require(density_path(path), container.digest)
    chosen = found.thresholds(wishes.density)
    for layer in chosen:
        if f"layers.{layer}.deciding" not in container.planes:
            raise FormatError(density_path(path), f"layer {layer}", "a layer with a deciding plane",
                              "none")  # fmt: skip
    return chosen


def find_fit(path: str, container: Container) -> Fit:
    """The predictors beside a container, or else inside it; UsageError where there are none."""
    if fit_path(path).exists():
        fit = open_fit(fit_path(path))
        fit.require(container.digest)
        return fit
    extents = fit_extents({name: (b.offset, b.n_bytes) for name, b in container.blobs.items()})
    if not extents:
        raise UsageError(f"approximate mode needs predictors, and there is no {fit_path(path)}: "
                         "flashllm fit makes it")
    return open_fit(path, extents=extents)


def acquired_planes(container: Container, predicted: Predicting | None) -> set[str]:
    """Planes of which single items are asked for: where sets are predicted, deciding rows too."""
    planes = sparse_planes(container)
    return planes if predicted is None else planes | predicted.planes() & set(container.planes)
