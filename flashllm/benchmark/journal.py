"""A run as JSON lines: what it is, each token, the result.  `flashllm plot` draws it.

The first line is {"flashllm_run": 1, …facts}, then one line per token, then {"result": …}.  A token
says what was done since the token before it, so that sums over lines are sums over the run; the
first one carries the prompt.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from typing import IO, Any

from ..api import LLM
from ..engine.results import Delta, Result
from ..engine.totals import Totals
from ..errors import FormatError
from ..regular import read_small

VERSION = 1
MAX_BYTES = 64 * 2**20  # some 100,000 tokens
COUNTERS = ("bytes_read", "reads", "hits", "misses", "prefetch_bytes", "audit_bytes",
            "bundles_read")  # fmt: skip


class Journal:
    """Writes one run to `file`; `heard(delta)` for each delta of `llm.stream`."""

    def __init__(self, file: IO[str], llm: LLM):
        self._file, self._llm = file, llm
        self._before = _sums(Totals())
        self._started = self._last = time.perf_counter()
        self._n = 0
        self._write({
            "flashllm_run": VERSION, "model": os.path.basename(str(llm.container.path)),
            "digest": llm.container.digest, "file_bytes": llm.container.size,
            "ram_budget": llm.ram_budget, "mode": llm.mode, "storage": llm.choice.name,
            "kernels": llm.kernels.name, "n_threads": llm.kernels.n_threads,
        })  # fmt: skip

    def heard(self, delta: Delta) -> None:
        """Write the tokens that became known, and the result with the last of them."""
        if delta.tokens:
            now, sums = time.perf_counter(), _sums(self._llm.totals)
            done = {name: value - self._before.get(name, 0) for name, value in sums.items()}
            self._write({
                "token": self._n, "ids": delta.tokens, "ms": 1e3 * (now - self._last),
                "at_s": now - self._started, "rss": self._llm.memory.rss(),
                **{name: done[name] for name in COUNTERS},
                "parts_ms": {name[:-3]: done[name] / 1e6 for name in done if name.endswith("_ns")},
            })  # fmt: skip
            self._before, self._last, self._n = sums, now, self._n + len(delta.tokens)
        if delta.result is not None:
            self._finish(delta.result)

    def _finish(self, result: Result) -> None:
        self._write({"result": {"finish_reason": result.finish_reason, "usage": result.usage,
                                "timings": result.timings, "flash": result.flash}})  # fmt: skip

    def _write(self, what: dict[str, Any]) -> None:
        self._file.write(json.dumps(what) + "\n")


def _sums(totals: Totals) -> dict[str, int]:
    """The counters of all steps so far, and the nanoseconds of each part of them."""
    out = dict.fromkeys(COUNTERS, 0)
    for share in (totals.prompt, totals.decode):
        counters = share.counters()
        for name in COUNTERS:
            out[name] += counters.get(name, 0)
        for part, ns in share.parts_ns().items():
            out[part + "_ns"] = out.get(part + "_ns", 0) + ns
    return out


def read_journal(path: str | os.PathLike) -> tuple[dict, list[dict], dict | None]:
    """(facts, tokens, result); the result is None where the run was cut off.

    FormatError for a file that is no journal, FlashReadError for one that cannot be read.
    """
    try:
        text = read_small(path, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(path, "journal", "UTF-8", str(error)[-80:]) from None
    lines = list(_objects(path, text.removesuffix("\n").split("\n")))
    if not lines or lines[0].get("flashllm_run") != VERSION:
        raise FormatError(path, "line 1", f'"flashllm_run": {VERSION}', str(lines[:1])[:80])
    tokens = [line for line in lines[1:] if "token" in line]
    for number, line in enumerate(tokens):
        wanted = {"ms", "at_s", "rss", "parts_ms", *COUNTERS}
        if not wanted <= line.keys() or not isinstance(line["parts_ms"], dict):
            raise FormatError(path, f"token {number}", f"keys {sorted(wanted)}", sorted(line))
    return lines[0], tokens, lines[-1].get("result")


def _objects(path: object, lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(path, f"line {number}", "a JSON object", str(error)[:80]) from None
        if not isinstance(found, dict):
            raise FormatError(path, f"line {number}", "a JSON object", line[:40])
        yield found
