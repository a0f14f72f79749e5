"""Progress for people: a bar on a terminal, a line every ten seconds otherwise, all on stderr."""

from __future__ import annotations

import sys
import time

HEARTBEAT_S = 10.0  # long silences look like a hang
# by the label's first word; everything else counts bytes
UNITS = {"prompt": "tok", "perplexity": "windows", "trace": "tok", "pass": "tok",
         "layers": "layers"}  # fmt: skip


def unit_of(label: str) -> str:
    return UNITS.get(label.split(" ", 1)[0], "B")


class Progress:
    """A callback (done, total, label); usable for convert, load, verify and prefill."""

    def __init__(self, stream=None, clock=time.monotonic):
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._bar = None
        self._label = None
        self._started = self._last = clock()

    def __call__(self, done: int, total: int, label: str = "") -> None:
        if label != self._label:
            self.close()
            self._label, self._started, self._last = label, self._clock(), self._clock()
        if self._stream.isatty():
            self._draw(done, total, label)
        else:
            self._beat(done, total, label)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _draw(self, done: int, total: int, label: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            unit = unit_of(label)
            self._bar = tqdm(
                total=total, desc=label, unit=unit, unit_scale=unit == "B", unit_divisor=1024,
                file=self._stream, leave=False,
            )
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def _beat(self, done: int, total: int, label: str) -> None:
        now = self._clock()
        if now - self._last < HEARTBEAT_S:
            return
        self._last = now
        rate = done / (now - self._started)
        left = f"{(total - done) / rate:.0f} s left" if rate else "no progress yet"
        share = 100 * done / total if total else 100.0
        print(f"{label}: {share:.0f} % ({done} of {total} {UNITS.get(label, 'B')}), {left}",
              file=self._stream, flush=True)
