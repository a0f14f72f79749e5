"""Canonical JSON: one spelling per value, bounded before it is parsed (FORMAT.md section 3)."""

from __future__ import annotations

import json
import math

from ..errors import FormatError
from .base import MAX_BRACKETS, MAX_COMMAS, MAX_DEPTH


def canonical_json(value: object) -> bytes:
    """The one spelling of `value`; ValueError or TypeError if it has none."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def parse_json(path: object, raw: bytes) -> object:
    """`raw` as canonical JSON of bounded size and depth, or FormatError."""

    def fail(expected: object, found: object) -> FormatError:
        return FormatError(path, "manifest", expected, found)

    def no_duplicates(pairs: list[tuple[str, object]]) -> dict:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise fail("each key once", f"{shown(twice)} twice")
        return made

    def no_constant(name: str) -> None:
        raise fail("finite numbers", name)

    n_commas, n_brackets = raw.count(b","), raw.count(b"[") + raw.count(b"{")
    if n_commas > MAX_COMMAS or n_brackets > MAX_BRACKETS:
        most = f"at most {MAX_COMMAS} commas and {MAX_BRACKETS} brackets"
        raise fail(most, f"{n_commas} and {n_brackets}")
    try:
        text = raw.decode("ascii")
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant)
        _check_values(path, value)
        same = canonical_json(value) == raw
    except RecursionError as error:
        raise fail(f"nesting of at most {MAX_DEPTH}", "more") from error
    except ValueError as error:  # not ASCII, not JSON, a number with thousands of digits
        raise fail("ASCII JSON", str(error)) from error
    if not same:
        raise fail("canonical JSON (sorted keys, no white space)", "another spelling")
    return value


def _check_values(path: object, value: object) -> None:
    """Depth, integers of 64 bits, finite floats, text that is Unicode."""
    waiting = [(value, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise FormatError(path, "manifest", f"nesting of at most {MAX_DEPTH}", "more")
        if isinstance(value, dict):
            waiting += [(key, depth) for key in value]
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
        elif isinstance(value, str):
            value.encode("utf-8")  # a lone surrogate is a ValueError
        elif isinstance(value, float) and not math.isfinite(value):
            raise FormatError(path, "manifest", "finite numbers", value)
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise FormatError(
                path, "manifest", "integers of 64 bits", f"one of {value.bit_length()}"
            )


def shown(value: object) -> str:
    """`value` for a message, which must not grow with the file."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"
