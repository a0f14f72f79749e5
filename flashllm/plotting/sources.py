"""What a file is, told by its first bytes, and the charts there are of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..benchmark.journal import read_journal
from ..errors import FlashError, FormatError
from ..predictors.fit import open_fit
from ..predictors.header import MAGIC as FIT_MAGIC
from ..regular import open_regular, read_exactly, read_small
from ..tracing import read_trace
from ..tracing.base import MAGIC as TRACE_MAGIC
from .charts import Chart
from .of_bench import bench_charts
from .of_fit import fit_charts
from .of_run import run_charts
from .of_trace import trace_charts

MAX_JSON_BYTES = 2**19  # a ladder of caps takes a tenth of it


def charts_of(path: str | os.PathLike, **sweep: Any) -> list[Chart]:
    """Charts of a trace, a fit, a run's journal or a benchmark; `sweep` is of_trace's.

    FormatError for anything else.
    """
    fd = open_regular(path)
    try:
        head = read_exactly(fd, path, 0, min(4096, os.fstat(fd).st_size), "a file to plot")
    finally:
        os.close(fd)
    if head.startswith(TRACE_MAGIC):
        return trace_charts(read_trace(path), **sweep)
    if head.startswith(FIT_MAGIC):
        return fit_charts(open_fit(path))
    if b'"flashllm_run"' in head.partition(b"\n")[0]:
        facts, tokens, _ = read_journal(path)
        with _values_of(path):
            return run_charts(_run_facts(path, facts), tokens)
    report = _bench_report(path)
    with _values_of(path):
        return bench_charts(path, report)


@contextmanager
def _values_of(path: object) -> Iterator[None]:
    """Which values a chart needs shows in making it; those of another kind are the file's fault."""
    try:
        yield
    except FlashError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise FormatError(path, "values", "what a chart is made of", str(error)[:200]) from error


def _run_facts(path: object, facts: dict[str, Any]) -> dict[str, Any]:
    for name, kind in (("model", str), ("ram_budget", int)):
        if not isinstance(facts.get(name), kind):
            raise FormatError(path, f"line 1, {name}", kind.__name__, repr(facts.get(name)))
    return facts


def _bench_report(path: str | os.PathLike) -> dict[str, Any]:
    raw = read_small(path, MAX_JSON_BYTES)
    try:
        report = json.loads(raw)
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict) or report.get("flashllm_bench") != 1:
        raise FormatError(
            path, "start", "a trace, a fit, `generate --trace` lines or `bench -o json`",
            "something else",
        )  # fmt: skip
    return report
