"""The counted part of a result's `flash`: what was read, hit, active, predicted.

Prompt and completion together, except where it says decode; None where nothing was counted.
"""

from __future__ import annotations

from typing import Any

from .totals import Totals


def flash_figures(totals: Totals) -> dict[str, Any]:
    """Bytes, counts and milliseconds of `totals` by their public names.

    `density`: share of neurons that added something to a token.  `recall` and `precision` are of
    the audited tokens, whose extra reading is `audit_bytes` and not part of `bytes_read`.
    `…_bundles` are of decoding, summed over tokens and layers: neurons that added something, that
    were predicted (approximate mode), that were read, and all there are.  `drafted` tokens were
    taken in on a guess, of which `accepted` were right.
    """
    counters, predicted = totals.counters(), totals.predicted
    active, neurons = (
        getattr(totals.prompt, name) + getattr(totals.decode, name)
        for name in ("active_neurons", "neurons")
    )
    hits, misses = counters.get("hits", 0), counters.get("misses", 0)
    decoding = totals.decode.counters()
    return {
        "bytes_read": counters.get("bytes_read", 0),
        "decode_bytes_read": decoding.get("bytes_read", 0),
        "audit_bytes": counters.get("audit_bytes", 0),
        "audit_ms": predicted.audit_ns / 1e6,
        "reads": counters.get("reads", 0),
        "decode_reads": decoding.get("reads", 0),
        "bytes_useful": counters.get("bytes_useful", 0),
        "decode_bytes_useful": decoding.get("bytes_useful", 0),
        "hits": hits,
        "misses": misses,
        "hit_rate": hits / (hits + misses) if hits + misses else None,
        "predicted_rows": predicted.predicted,
        "wasted_rows": max(0, predicted.predicted - predicted.computed),
        "recall": predicted.recall,
        "precision": predicted.precision,
        "density": active / neurons if neurons else None,
        "active_bundles": totals.decode.active_neurons,
        "predicted_bundles": predicted.predicted,
        "read_bundles": decoding.get("bundles_read", 0),
        "all_bundles": totals.decode.neurons,
        "drafted": totals.drafted,
        "accepted": totals.accepted,
        "stall_ms": counters.get("wait_ns", 0) / 1e6,
        "decompress_ms": counters.get("decode_ns", 0) / 1e6,
    }
