"""A scanner for flat JSON of known shape, in which hostile input cannot grow.

A general parser builds whatever the text says, and a megabyte of brackets becomes a hundred
megabytes of lists.  Headers of checkpoints have a fixed shape, so the reader asks for what must
come next and stops at the first thing that is not it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from json.decoder import scanstring

from ..errors import CheckpointError

_SPACE = re.compile(r"[ \t\n\r]*")
_INTEGERS = re.compile(r"\[[ \t\n\r]*(?:\d{1,19}(?:[ \t\n\r]*,[ \t\n\r]*\d{1,19})*)?[ \t\n\r]*\]")
_SCALAR = re.compile(r"(?:-?\d[\d.eE+-]{0,30}|true|false|null)(?=[\s,}\]])")


class Scanner:
    """Reads `text` from the left; every failure is a CheckpointError naming file and place."""

    def __init__(self, text: str, path: object, where: str = "header"):
        self.text, self.path, self.where, self.at = text, path, where, 0

    def fail(self, expected: str) -> CheckpointError:
        found = repr(self.text[self.at : self.at + 20]) if self.at < len(self.text) else "the end"
        return CheckpointError(self.path, f"{self.where} at {self.at}", expected, found)

    def peek(self) -> str:
        self.at = _SPACE.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def take(self, mark: str) -> None:
        if self.peek() != mark:
            raise self.fail(repr(mark))
        self.at += 1

    def string(self, max_length: int = 1024) -> str:
        self.take('"')
        try:
            value, self.at = scanstring(self.text, self.at, True)
        except ValueError as problem:
            raise CheckpointError(self.path, self.where, "a string", str(problem)[:80]) from None
        if len(value) > max_length:
            raise CheckpointError(
                self.path, self.where, f"a string of at most {max_length}", f"{len(value)}"
            )
        return value

    def integers(self, max_length: int) -> tuple[int, ...]:
        """A list of non-negative integers below 10**19."""
        self.peek()
        # cut before matching: the pattern's own bookkeeping grows with what it repeats over
        end = self.text.find("]", self.at, self.at + 24 * max_length + 2) + 1
        match = _INTEGERS.fullmatch(self.text, self.at, end) if end else None
        if not match:
            raise self.fail(f"a list of at most {max_length} non-negative integers")
        self.at = end
        inside = match[0][1:-1].strip()
        values = tuple(int(number) for number in inside.split(",")) if inside else ()
        if len(values) > max_length:
            raise self.fail(f"at most {max_length} integers")
        return values

    def keys(self) -> Iterator[str]:
        """The keys of an object, the scanner standing at each one's value; no key may repeat."""
        seen: set[str] = set()
        self.take("{")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            key = self.string()
            if key in seen:
                raise CheckpointError(self.path, self.where, "each key once", repr(key))
            seen.add(key)
            self.take(":")
            yield key
            if self.peek() == "}":
                self.at += 1
                return
            self.take(",")

    def skip_scalar(self) -> None:
        if self.peek() == '"':
            self.string(max_length=2**20)
            return
        match = _SCALAR.match(self.text, self.at)
        if not match:
            raise self.fail("a number, a text, true, false or null")
        self.at = match.end()

    def end(self) -> None:
        if self.peek():
            raise self.fail("nothing more")
