"""Sizes as people write them and as people read them.  Binary units: 1 MiB = 2**20 bytes."""

from __future__ import annotations

import re

from .errors import UsageError

KIB, MIB, GIB = 2**10, 2**20, 2**30
MOST_BYTES = 2**62  # of any size: sums and products of a few of them stay numbers that C knows

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z%]*)\s*")
_FACTORS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    # As memory sizes are meant on command lines: K, KB and KiB are all 1024.
    for _suffix in ("", "b", "ib"):
        _FACTORS[_letter + _suffix] = 2 ** (10 * _power)


def parse_size(text: str | int, *, whole_bytes: int | None = None) -> int:
    """Bytes in `text`: an int, "1500M", "2GiB", or "50%" of `whole_bytes`.

    Raises UsageError for anything else, for a percentage without a whole, and for sizes below 1
    or above MOST_BYTES.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise UsageError(f"a size is bytes or text such as '512MiB', not {text!r}")
    if isinstance(text, int):
        size = text
    else:
        match = _SIZE.fullmatch(text)
        if not match:
            raise UsageError(f"cannot read {text!r} as a size (such as 512MiB, 2G, 50%)")
        number, unit = float(match[1]), match[2].lower()
        if unit == "%":
            if whole_bytes is None:
                raise UsageError(f"{text!r}: a percentage has no meaning here")
            size = whole_bytes * number / 100
        elif unit in _FACTORS:
            size = number * _FACTORS[unit]
        else:
            raise UsageError(f"unknown unit {match[2]!r} in size {text!r}")
    if size < 1:
        raise UsageError(f"a size must be at least one byte, not {text!r}")
    if size > MOST_BYTES:  # infinity too, which has no int
        raise UsageError(f"a size must be at most {MOST_BYTES} bytes, not {str(text)[:40]!r}")
    return int(size)


def format_size(n_bytes: int) -> str:
    """`n_bytes` for people: '17 B', '3.5 KiB', '512.0 MiB', '4.0 GiB'."""
    if abs(n_bytes) < KIB:
        return f"{n_bytes} B"
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if abs(n_bytes) >= unit:
            return f"{n_bytes / unit:.1f} {name}"
    return f"{n_bytes / KIB:.1f} KiB"


def align_up(n: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is at least `n`."""
    return -(-n // alignment) * alignment
