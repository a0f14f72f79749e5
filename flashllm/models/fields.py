"""Numbers and flags out of a dictionary somebody else wrote.

A config.json, or the config a container carries, is input: every field is read through `Fields`,
which checks type and range and raises with the file, the key, what was expected and what was
found.  Nothing is read by `dict[...]` elsewhere in the model configs.
"""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError, FormatError

_ABSENT = object()

# Larger than any published model by a factor of ten and more, small enough that products of two
# or three of them stay far below 2**63.
MAX_VOCAB, MAX_WIDTH, MAX_LAYERS, MAX_HEADS, MAX_CONTEXT = 2**24, 2**21, 2**12, 2**14, 2**30


class Fields:
    """Typed, bounded access to `raw`; `path` is named in errors of class `error`."""

    def __init__(
        self, raw: object, path: object = "config.json", error: type[FormatError] = CheckpointError
    ):
        self.path, self.error = path, error
        if not isinstance(raw, dict):
            raise error(path, "config", "an object", type(raw).__name__)
        self.raw: dict[str, Any] = raw

    def fail(self, key: str, expected: object, found: object) -> FormatError:
        return self.error(self.path, key, expected, _short(found))

    def get(self, key: str, default: Any = None) -> Any:
        """The unchecked value, None and absence being the same."""
        value = self.raw.get(key)
        return default if value is None else value

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            if default is _ABSENT:
                raise self.fail(key, "a value", "nothing")
            return default
        return value

    def integer(self, key: str, low: int, high: int, default: Any = _ABSENT) -> Any:
        value = self._value(key, default)
        if value is None:
            return None  # the default: this number may be missing
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, "an integer", value)
        if not low <= value <= high:
            raise self.fail(key, f"{low} to {high}", value)
        return value

    def number(self, key: str, low: float, high: float, default: Any = _ABSENT) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, "a number", value)
        if not low <= value <= high:  # not NaN either, nor an integer that no float holds
            raise self.fail(key, f"{low} to {high}", value)
        return float(value)

    def flag(self, key: str, default: Any = _ABSENT) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false", value)
        return value

    def text(self, key: str, default: Any = _ABSENT) -> str:
        value = self._value(key, default)
        if not isinstance(value, str) or len(value) > 200:
            raise self.fail(key, "a short text", value)
        return value

    def integers(self, key: str, low: int, high: int, max_length: int) -> tuple[int, ...]:
        value = self._value(key, _ABSENT)
        if not isinstance(value, list | tuple) or len(value) > max_length:
            raise self.fail(key, f"a list of at most {max_length} integers", value)
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int) or not low <= item <= high:
                raise self.fail(key, f"integers from {low} to {high}", item)
        return tuple(value)

    def numbers(
        self, key: str, low: float, high: float, max_length: int, default: Any = _ABSENT
    ) -> tuple[float, ...]:
        value = self._value(key, default)
        if not isinstance(value, list | tuple) or len(value) > max_length:
            raise self.fail(key, f"a list of at most {max_length} numbers", value)
        items = Fields({str(i): item for i, item in enumerate(value)}, f"{self.path}: {key}",
                       self.error)  # fmt: skip
        return tuple(items.number(name, low, high) for name in items.raw)

    def sub(self, key: str) -> Fields | None:
        """The object under `key`, or None where it is absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, "an object", value)
        return Fields(value, f"{self.path}: {key}", self.error)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def token_ids(fields: Fields, key: str, vocab_size: int) -> tuple[tuple[int, ...], list[str]]:
    """Ids under `key` (a number, a list or null) inside the vocabulary, and warnings."""
    value = fields.get(key)
    if value is None:
        return (), [f"{key} is not set"]
    ids, warnings = [], []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, bool) or not isinstance(item, int):
            raise fields.fail(key, "token ids", item)
        if 0 <= item < vocab_size:
            ids.append(item)
        else:
            warnings.append(f"{key} {item} is outside the vocabulary of {vocab_size}; ignored")
    return tuple(dict.fromkeys(ids)), warnings
