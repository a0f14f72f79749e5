"""Rows of a ladder as llama-bench prints them: a Markdown table, CSV with every field, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from ..units import MIB, format_size
from .ladder import Row

HEAD = ("model", "size", "params", "backend", "threads", "cap", "peak", "test", "t/s", "hit %",
        "MiB/token", "stall %", "cache", "x floor")  # fmt: skip
_LEFT = {"model", "backend", "cap", "test", "cache"}


def markdown(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """The table, and below it what it cannot say in columns."""
    lines = [_line(HEAD), _line([":---" if name in _LEFT else "---:" for name in HEAD])]
    lines += [_line(_cells(row)) for row in rows]
    lines += _parts(rows)
    lines.append("")
    lines += [f"{key}: {value}" for key, value in about.items()]
    limits = ", ".join(dict.fromkeys(row.enforced for row in rows))
    lines.append(f"limit: {limits}; a percentage is of the container file")
    for row in rows:
        if row.note:
            lines.append(f"{row.cap} {row.test}: {row.note}")
    return "\n".join(lines) + "\n"


def as_csv(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """One line per row with every number, parts of a token as columns of their own."""
    flat = [about | _flat(row) for row in rows]
    names = list(dict.fromkeys(name for one in flat for name in one))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """One object: what it ran on, and the rows with every repetition."""
    return json.dumps({"flashllm_bench": 1, **about, "rows": [row.to_dict() for row in rows]},
                      indent=1) + "\n"  # fmt: skip


def _cells(row: Row) -> list[str]:
    facts = row.facts
    cap = row.cap if row.cap_bytes is None else f"{row.cap} ({row.cap_bytes / MIB:.0f} MiB)"
    speed = row.failed or f"{row.tokens_per_s:.2f}"
    if row.tokens_per_s_sd is not None:
        speed += f" ± {row.tokens_per_s_sd:.2f}"
    model = f"{row.model} {facts.get('family', '')} {facts.get('weight_type', '')}".strip()
    backend = f"{facts.get('kernels', '-')}, {facts.get('storage', '-')}"
    return [
        model,
        format_size(facts["file_bytes"]) if facts else "-",
        _count(facts["parameters"]) if facts else "-",
        backend,
        str(facts.get("n_threads", "-")),
        cap,
        "-" if row.peak_rss is None else f"{row.peak_rss / MIB:.0f} MiB",
        row.test,
        speed,
        _number(row.hit_rate, 100),
        _number(row.bytes_per_token, 1 / MIB, 2),
        _number(row.stall, 100),
        row.cache,
        _number(row.time_over_floor if _floor_counts(row) else None, 1, 2),
    ]


def _floor_counts(row: Row) -> bool:
    """Prompts compute: they have a floor worth a column only where the device sets it."""
    floor = row.floor_ms
    return row.test.startswith("tg") or floor.get("flash", 0.0) > floor.get("dram", 0.0)


def _parts(rows: Sequence[Row]) -> list[str]:
    """Where a completion's mean token went, ms (docs/MEASURING.md says what the parts are)."""
    rows = [row for row in rows if row.per_token_ms]
    if not rows:
        return []
    names = list(rows[0].per_token_ms)
    head = ["cap", "test", *(f"{name} ms" for name in names), "dram floor", "flash floor"]
    lines = ["", _line(head), _line([":---", ":---", *["---:"] * (len(names) + 2)])]
    for row in rows:
        floors = [_number(row.floor_ms.get(name), 1, 2) for name in ("dram", "flash")]
        values = [_number(row.per_token_ms[name], 1, 2) for name in names]
        lines.append(_line([row.cap, row.test, *values, *floors]))
    return lines


def _flat(row: Row) -> dict[str, Any]:
    out = {}
    for name, value in row.to_dict().items():
        if isinstance(value, dict):
            out |= {f"{name}.{key}": inner for key, inner in value.items()}
        elif name == "samples":
            out["samples_tokens_per_s"] = " ".join(str(one["tokens_per_s"]) for one in value)
        else:
            out[name] = value
    return out


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, factor: float, digits: int = 1) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"
