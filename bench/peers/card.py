"""The rounds of one or several models as a card: markdown to read, JSON with every raw number."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from flashllm.units import MIB

HEAD = (
    "cap", "peer", "decode tok/s (all rounds)", "n", "prefill tok/s (ours / it)", "MiB/token",
    "peak MiB", "ours / it", "approx / it", "it / llama.cpp all", "remark",
)  # fmt: skip


def write_card(out: Path, models: list[dict[str, Any]]) -> str:
    """Writes out.md and out.json; the markdown."""
    text = "\n\n".join([header(models[0]), *(section(model) for model in models)]) + "\n"
    out.with_suffix(".json").write_text(json.dumps({"models": models}, indent=1))
    out.with_suffix(".md").write_text(text)
    return text


def header(model: dict[str, Any]) -> str:
    machine = model["machine"]
    return "\n".join([
        "# Against peers",
        "",
        f"flashllm {model['flashllm']}; {machine['cpu']}, {model['threads']} threads, Linux "
        f"{machine['kernel']}; disk {machine['sequential_bytes_per_s'] / 1e9:.2f} GB/s in 1 MiB "
        f"reads, read-ahead {model['read_ahead_kib']} KiB as found.  `bench/against_peers.py`: a "
        "process per cell, in a memory cgroup of exactly the cap (`all`: nothing short), page "
        "cache cold (mincore), greedy, cells interleaved, caps as shares of our file.  Medians; "
        "`n` tokens were decoded after the first; MiB/token are the process's reads from the "
        "device while decoding.  `ours / it` and `approx / it` compare our exact and approximate "
        "mode with the row at the same cap, `it / llama.cpp all` the row with llama.cpp that has "
        "all memory: ratios inside each round, then the median.",
    ])


def section(model: dict[str, Any]) -> str:
    lines = [
        f"## {model['model']}", "",
        f"{model['note']}  {model['bytes'] / MIB:.0f} MiB; prompt of {model['n_prompt']} tokens; "
        f"{len(model['rounds'])} rounds.", "",
        "| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD),
    ]  # fmt: skip
    cells = dict.fromkeys((row["cap"], row["key"]) for rows in model["rounds"] for row in rows)
    for cap, key in cells:
        lines.append("| " + " | ".join(line(model["rounds"], cap, key)) + " |")
    return "\n".join(lines)


def line(rounds: list[list[dict]], cap: str, key: str) -> list[str]:
    found = [row for rows in rounds for row in rows if (row["cap"], row["key"]) == (cap, key)]
    name, ran = found[0]["peer"], [row for row in found if row.get("state") == "ran"]
    remarks = [found[0].get("difference", "")]
    remarks += dict.fromkeys(
        f"{row['state']} {row['why']}" for row in found if row.get("state", "ran") != "ran"
    )
    if "missing" in found[0]:
        return [cap, name, *[""] * 8, f"missing: {found[0]['missing']}"]
    remark = "; ".join(filter(None, remarks))
    if not ran:
        peak = max(row["charges"]["peak_bytes"] for row in found) / MIB
        return [cap, name, *[""] * 4, f"{peak:.0f}", *[""] * 3, remark]
    speeds = [row["tokens_per_s"] for row in ran]
    return [
        cap, name,
        f"{statistics.median(speeds):.2f} ({', '.join(f'{speed:.2f}' for speed in speeds)})",
        str(ran[0]["n_decoded"]),
        prefill(rounds, cap, key, ran),
        middle([row["decode_bytes_per_token"] for row in ran], "{:.0f}", MIB),
        f"{max(row['charges']['peak_bytes'] for row in ran) / MIB:.0f}",
        ratio(rounds, (cap, "ours"), (cap, key)),
        ratio(rounds, (cap, "ours-approx"), (cap, key)),
        ratio(rounds, (cap, key), ("all", "llama.cpp")),
        remark,
    ]  # fmt: skip


def prefill(rounds: list[list[dict]], cap: str, key: str, ran: list[dict]) -> str:
    speed = middle([row["prefill_tokens_per_s"] for row in ran], "{:.1f}")
    ours = ratio(rounds, (cap, "ours"), (cap, key), "prefill_tokens_per_s")
    return f"{speed} ({ours})" if speed and ours else speed


def ratio(
    rounds: list[list[dict]],
    one: tuple[str, str],
    other: tuple[str, str],
    of: str = "tokens_per_s",
) -> str:
    """The median over rounds of one cell's speed over another's; empty where either is missing."""
    found = []
    for rows in rounds:
        speed = {
            (row["cap"], row["key"]): row[of]
            for row in rows
            if row.get("state") == "ran" and row[of]
        }
        if one in speed and other in speed:
            found.append(speed[one] / speed[other])
    return middle(found, "{:.2f}") if one != other else ""


def middle(values: list[float | None], pattern: str, unit: float = 1) -> str:
    known = [value / unit for value in values if value is not None]
    return pattern.format(statistics.median(known)) if known else ""
