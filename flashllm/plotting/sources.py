"""What a file is, told by its first bytes, and the charts there are of it."""

from __future__ import annotations

import json
import os
from typing import Any

from ..benchmark.journal import read_journal
from ..errors import FlashReadError, FormatError
from ..predictors.fit import open_fit
from ..predictors.header import MAGIC as FIT_MAGIC
from ..tracing import read_trace
from ..tracing.base import MAGIC as TRACE_MAGIC
from .charts import Chart
from .of_bench import bench_charts
from .of_fit import fit_charts
from .of_run import run_charts
from .of_trace import trace_charts

MAX_JSON_BYTES = 256 * 2**20


def charts_of(path: str | os.PathLike, **sweep: Any) -> list[Chart]:
    """Charts of a trace, a fit, a run's journal or a benchmark; `sweep` is of_trace's.

    FormatError for anything else.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise FlashReadError(error.errno, error.strerror, path, 0, "a file to plot") from error
    if head.startswith(TRACE_MAGIC):
        return trace_charts(read_trace(path), **sweep)
    if head.startswith(FIT_MAGIC):
        return fit_charts(open_fit(path))
    if size > MAX_JSON_BYTES:
        raise FormatError(path, "size", f"at most {MAX_JSON_BYTES} bytes of JSON", size)
    if b'"flashllm_run"' in head.partition(b"\n")[0]:
        facts, tokens, _ = read_journal(path)
        return run_charts(_run_facts(path, facts), tokens)
    return bench_charts(path, _bench_report(path))


def _run_facts(path: object, facts: dict[str, Any]) -> dict[str, Any]:
    for name, kind in (("model", str), ("ram_budget", int)):
        if not isinstance(facts.get(name), kind):
            raise FormatError(path, f"line 1, {name}", kind.__name__, repr(facts.get(name)))
    return facts


def _bench_report(path: str | os.PathLike) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict) or report.get("flashllm_bench") != 1:
        raise FormatError(
            path, "start", "a trace, a fit, `generate --trace` lines or `bench -o json`",
            "something else",
        )  # fmt: skip
    return report
