"""Thresholds of magnitude: which neurons of a gated FFN without exact zeros may be left out.

A neuron is computed when its activated gate is at least the layer's threshold from zero.  The
thresholds of a wanted density are quantiles of that magnitude over a text, layer by layer (CATS,
arXiv 2404.08763; TEAL, arXiv 2408.14690, thresholds inputs in the same way).  They are a page of
JSON beside the container, MODEL.density, which is read with suspicion:

    {"densities": [0.3, 0.5], "layers": {"0": [0.21, 0.11], …}, "model": DIGEST, "n_tokens": 4096,
     "text": SHA256, "version": 1}
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..durable import WholeFile
from ..errors import FitMismatchError, FormatError, UnsupportedError, UsageError
from ..regular import read_small

VERSION = 1
MAX_BYTES = 2 * 2**20
LARGEST = 1e300  # neither NaN nor an integer that no float holds is below it
MAX_DENSITIES = 16
MAX_LAYERS = 2**13


def density_path(model: str | os.PathLike) -> Path:
    """Where the thresholds of a container are looked for: `model.flash.density`."""
    return Path(f"{os.fspath(model)}.density")


@dataclass(frozen=True)
class Magnitudes:
    """`layers`: layer -> a threshold per density; `densities` ascend, so thresholds fall."""

    model: str
    text: str
    n_tokens: int
    densities: tuple[float, ...]
    layers: dict[int, tuple[float, ...]]

    def require(self, path: object, digest: str) -> None:
        """FitMismatchError unless this was calibrated on the container with that digest."""
        if digest != self.model:
            raise FitMismatchError(path, self.model, digest)

    def thresholds(self, density: float) -> dict[int, float]:
        """Layer -> threshold for `density`; UsageError for one that was not calibrated."""
        for i, known in enumerate(self.densities):
            if abs(known - density) < 1e-9:
                return {layer: values[i] for layer, values in self.layers.items()}
        known = ", ".join(f"{d:g}" for d in self.densities)
        raise UsageError(f"density {density:g} was asked for; calibrated: {known}")

    def save(self, path: str | os.PathLike) -> None:
        """Write the file whole or not at all."""
        text = json.dumps({**asdict(self), "version": VERSION}, sort_keys=True)
        with WholeFile(path) as out:
            out.file.write(f"{text}\n".encode("ascii"))
            out.commit()


def read_magnitudes(path: str | os.PathLike) -> Magnitudes:
    """FormatError for what is not such a file, UnsupportedError for another version,
    FlashReadError when it cannot be read."""
    path = Path(path)
    raw = read_small(path, MAX_BYTES)
    # Counted before they are parsed: a list takes twenty times the bytes of its brackets.
    n_lists, n_values = raw.count(b"[") + raw.count(b"{"), raw.count(b",")
    if n_lists > MAX_LAYERS + 8 or n_values > MAX_LAYERS * MAX_DENSITIES:
        raise FormatError(path, "file", "a list per layer", f"{n_lists} and {n_values} commas")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(path, "file", "JSON", error) from None
    if not isinstance(found, dict):
        raise FormatError(path, "file", "an object", type(found).__name__)
    if found.get("version") != VERSION:
        raise UnsupportedError(f"{path}: version {found.get('version')!r}; supported: {VERSION}")
    keys = {"densities", "layers", "model", "n_tokens", "text", "version"}
    if set(found) != keys:
        raise FormatError(path, "keys", sorted(keys), sorted(found))
    return _checked(path, found)


def _checked(path: Path, found: dict[str, Any]) -> Magnitudes:
    for name in ("model", "text"):
        if not isinstance(found[name], str) or len(found[name]) != 64:
            raise FormatError(path, name, "64 hex digits", repr(found[name])[:80])
    n_tokens = found["n_tokens"]
    if isinstance(n_tokens, bool) or not isinstance(n_tokens, int) or n_tokens < 1:
        raise FormatError(path, "n_tokens", "a count", repr(n_tokens)[:80])
    densities = _numbers(path, "densities", found["densities"])
    ascending = all(a < b for a, b in zip(densities, densities[1:], strict=False))
    if not 1 <= len(densities) <= MAX_DENSITIES or not ascending or not densities[0] > 0:
        raise FormatError(path, "densities", "ascending numbers above 0", repr(densities)[:80])
    if densities[-1] >= 1:
        raise FormatError(path, "densities", "numbers below 1", densities[-1])
    raw_layers, layers = found["layers"], {}
    if not isinstance(raw_layers, dict) or not 1 <= len(raw_layers) <= MAX_LAYERS:
        raise FormatError(path, "layers", f"1 to {MAX_LAYERS} layers", type(raw_layers).__name__)
    for key, values in raw_layers.items():
        if not key.isascii() or not key.isdigit() or len(key) > 4:
            raise FormatError(path, "layers", "a layer's number", repr(key)[:80])
        layers[int(key)] = _numbers(path, f"layer {key}", values)
        if len(layers[int(key)]) != len(densities) or min(layers[int(key)]) < 0:
            raise FormatError(path, f"layer {key}", "a magnitude per density", repr(values)[:80])
    return Magnitudes(found["model"], found["text"], n_tokens, densities, layers)


def _numbers(path: Path, where: str, values: Any) -> tuple[float, ...]:
    good = isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < LARGEST for v in values
    )
    if not good:
        raise FormatError(path, where, "a list of finite numbers", repr(values)[:80])
    return tuple(float(v) for v in values)
