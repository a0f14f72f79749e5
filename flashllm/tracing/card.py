"""The card beside a trace: what was recorded, of what, when, and what it says, as Markdown."""

from __future__ import annotations

from .base import Trace
from .statistics import SPANS, UNION, LayerStatistics


def card(
    trace: Trace, rows: list[LayerStatistics], *, model_name: str, date: str, n_bytes: int
) -> str:
    """Markdown; `date` as the caller writes dates, `model_name` what the model was called."""
    spans = "/".join(map(str, SPANS))
    lines = [
        f"# {trace.path.name}",
        "",
        f"- model: {model_name} ({trace.family}), digest `{trace.model}`",
        f"- text: {trace.text_name}, SHA-256 `{trace.text}`",
        f"- recorded: {date}",
        f"- {trace.n_tokens} tokens in {len(trace.starts)} contexts; {n_bytes} bytes",
        "",
        f"Reuse: share of a token's active bundles that were active in the last {spans} tokens; in "
        "brackets what independent tokens with the same frequencies per bundle would give. Union: "
        f"share of the layer that {UNION} consecutive tokens use. Never: share that no token used.",
        "",
        f"| layer | bundles | active | reuse {spans} | union {UNION} | never |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        pairs = zip(row.reuse, row.chance, strict=True)
        reuse = " / ".join(f"{_figure(r)} ({_figure(c)})" for r, c in pairs)
        lines.append(f"| {row.plane} | {row.n_bundles} | {100 * row.active:.2f} % | {reuse} | "
                     f"{_figure(row.union)} | {_figure(row.never)} |")
    mean = sum(row.active * row.n_bundles for row in rows) / sum(row.n_bundles for row in rows)
    lines += ["", f"Mean active share per token: {100 * mean:.2f} %.", ""]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
