"""When to stop, and which text may already be shown.

Stop strings may straddle tokens, so text that could be the beginning of one is held back until it
is decided; what was handed out is never taken back.
"""

from __future__ import annotations


class StopStrings:
    """Cuts a stream of text pieces at the first stop string.

    `include_stop` keeps the stop string itself in the text.
    """

    def __init__(self, stops: tuple[str, ...], *, include_stop: bool = False):
        self._stops, self._include = stops, include_stop
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is safe to show after `piece`; sets `stopped` at a stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            # The earliest wins; of two that start together the longer, so order never matters.
            at, stop = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            self.stopped, self._held = True, ""
            return text[: at + len(stop)] if self._include else text[:at]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when generation ends for another reason."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
