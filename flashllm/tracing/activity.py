"""What tokens use of each layer, as a container carries it: by this a plan shares slots out.

The blob `activity.json`: an object, plane -> share of its bundles that a token uses (0 to 1), as a
trace of that model has shown.  Orders come and go, a layer's share stays.
"""

from __future__ import annotations

import json

from ..errors import FormatError
from .base import Trace

BLOB = "activity.json"
MAX_BYTES = 2**18  # a line per layer


def layer_use(trace: Trace) -> list[float]:
    """Per layer the share of its bundles that a token uses."""
    return [
        len(trace.active(layer)[1]) / (trace.n_tokens * info.n_bundles)
        for layer, info in enumerate(trace.layers)
    ]


def encode_activity(trace: Trace) -> bytes:
    """The blob of a model that `trace` is of."""
    shares = zip(trace.layers, layer_use(trace), strict=True)
    return json.dumps({info.plane: round(use, 6) for info, use in shares}, indent=1).encode()


def decode_activity(path: object, raw: bytes) -> dict[str, float]:
    """Plane -> share; FormatError for anything else."""
    if len(raw) > MAX_BYTES:
        raise FormatError(path, f"blob {BLOB}", f"at most {MAX_BYTES} bytes", len(raw))
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FormatError(path, f"blob {BLOB}", "a JSON object", repr(raw[:40]))
    for plane, use in found.items():
        if isinstance(use, bool) or not isinstance(use, int | float) or not 0 <= use <= 1:
            raise FormatError(path, f"blob {BLOB}, {plane}", "a share from 0 to 1", repr(use)[:40])
    return {plane: float(use) for plane, use in found.items()}
