"""The standard streams, in whatever state they were left to us, and text from a file or stdin."""

from __future__ import annotations

import os
import sys

from ..errors import UsageError

# A text and its ids are in memory beside the model; the largest that is used has a few megabytes.
MAX_TEXT = 2**26


def make_usable() -> None:
    """A stream that was closed before we started leads to the null device from here on.

    Python has None in its place, and the next file to be opened, the model, would get its number.
    Input is UTF-8 whatever the
    locale; letters that stdout's encoding lacks come out as question marks.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Held for good: this is the lowest free number, the one that is missing.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream, how in ((sys.stdin, {"encoding": "utf-8", "errors": "strict"}),
                        (sys.stdout, {"errors": "replace"})):  # fmt: skip
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(**how)


def read_text(path: str) -> str:
    """The UTF-8 text of a file or pipe, or of stdin for `-`; UsageError for what is none, and for
    one without an end."""
    name = "stdin" if path == "-" else path
    try:
        if path == "-":
            text = sys.stdin.read(MAX_TEXT + 1)
        else:
            with open(path, encoding="utf-8") as file:
                text = file.read(MAX_TEXT + 1)
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: not UTF-8: {error.reason} at byte {error.start}") from None
    if len(text) > MAX_TEXT:
        raise UsageError(f"{name}: more than {MAX_TEXT} characters")
    return text
