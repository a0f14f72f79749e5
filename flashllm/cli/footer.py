"""A live status line at the bottom of a terminal, below streaming text.

The terminal's scroll region is shortened by one row for the time of the run, so that text scrolls
above the line (DECSTBM, DEC VT100).  Without a terminal a line every ten seconds takes its place.
"""

from __future__ import annotations

import shutil
import sys
import time

from ..units import MIB
from .progress import HEARTBEAT_S


def status_line(n_tokens: int, seconds: float, flash: dict, budget_bytes: int) -> str:
    """`42 tok | 3.1 tok/s | RAM 231/256 MiB | hit 71 % | 38.0 MiB/token | wait 62 %`."""
    hit = flash.get("hit_rate")
    wait = flash.get("stall_ms", 0.0) / 10 / seconds if seconds else 0.0
    return " | ".join((
        f"{n_tokens} tok",
        f"{n_tokens / seconds if seconds else 0.0:.1f} tok/s",
        f"RAM {flash.get('rss', 0) // MIB}/{budget_bytes // MIB} MiB",
        f"hit {'-' if hit is None else f'{100 * hit:.0f}'} %",
        f"{flash.get('bytes_read', 0) / MIB / max(n_tokens, 1):.1f} MiB/token",
        f"wait {wait:.0f} %",
    ))  # fmt: skip


def approximation(flash: dict) -> str:
    """` | approx: prompt exact, recall 99.1 %, precision 61 %, 4.2 % of neurons`, or nothing."""
    if flash["mode"] != "approx":
        return ""
    recall = "recall not measured"
    if flash["recall"] is not None:
        recall = f"recall {100 * flash['recall']:.1f} %, precision {100 * flash['precision']:.0f} %"
    share = flash["active_bundles"] / flash["all_bundles"] if flash["all_bundles"] else 0.0
    return f" | approx: prompt exact, {recall}, {100 * share:.1f} % of neurons"


class Footer:
    """A context manager; `show(text)` replaces the line, at most ten times a second."""

    def __init__(self, stream=None, clock=time.monotonic):
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._live = self._stream.isatty() and sys.stdout.isatty()
        self._last = clock()
        self._rows = shutil.get_terminal_size().lines

    def __enter__(self) -> Footer:
        if self._live:
            # Make room, keep the cursor above the line, shorten the scroll region.
            self._write(f"\n\x1b[1A\x1b7\x1b[1;{self._rows - 1}r\x1b8")
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live:
            self._write(f"\x1b7\x1b[r\x1b[{self._rows};1H\x1b[2K\x1b8")

    def show(self, text: str) -> None:
        now = self._clock()
        if now - self._last < (0.1 if self._live else HEARTBEAT_S):
            return
        self._last = now
        if self._live:
            self._write(f"\x1b7\x1b[{self._rows};1H\x1b[2K{text}\x1b8")
        else:
            self._write(f"\n[{text}]\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
