"""The ladder: rungs of caps, each a fresh process, cold, in a memory cgroup of exactly the cap.

Where groups cannot be made the child limits its own private memory, and every row says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..probe.curve import DeviceCurve, best_curve
from ..probe.device import probe_device
from ..stress.confine import Seen, cached_bytes, can_confine, make_cold, run_child
from ..units import MIB, parse_size

TIMEOUT_S = 24 * 3600
SAMPLE_S = 0.05  # a look at /proc every millisecond, as `stress` takes, would be measured too
PROBE_S = 1.0
COLD_BYTES = MIB  # what may be left in the page cache and still be called cold


@dataclass(frozen=True)
class Row:
    """One test on one rung.  Numbers are means over `samples` (one per repetition).

    `failed` says what happened instead of numbers.  `cache_before` and `cache_after` are bytes of
    the file in the page cache as mincore saw them, before the process started and after it ended.
    """

    test: str
    cap: str
    cap_bytes: int | None
    enforced: str
    model: str
    tokens_per_s: float | None = None
    tokens_per_s_sd: float | None = None
    hit_rate: float | None = None
    bytes_per_token: float | None = None
    reads_per_token: float | None = None
    stall: float | None = None
    time_over_floor: float | None = None
    floor_ms: dict[str, float] = field(default_factory=dict)
    per_token_ms: dict[str, float] = field(default_factory=dict)
    peak_rss: int | None = None
    peak_cgroup: int | None = None
    limit_hits: int | None = None
    oom_kills: int | None = None
    cache_before: int = 0
    cache_after: int = 0
    failed: str = ""
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    samples: tuple[dict[str, Any], ...] = ()

    @property
    def cache(self) -> str:
        """The page cache when the process started: cold, or how much of the file was in it."""
        if self.cache_before <= COLD_BYTES:
            return "cold"
        return f"{self.cache_before / MIB:.0f} MiB cached"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"cache": self.cache}


def climb(
    model: str,
    *,
    caps: Sequence[str | None],
    tests: Sequence[tuple[str, int]],
    repetitions: int,
    engine: dict[str, Any],
    told: Callable[[str], None],
) -> list[Row]:
    """Rows of every test on every rung, rung by rung.

    caps    sizes as people write them, a percentage being of the file; None: what this machine
            leaves us, and no limit
    tests   ("pp", tokens of a prompt) and ("tg", tokens of a completion)
    engine  keyword arguments of LLM
    told    hears a line of text as things happen
    """
    size = Path(model).stat().st_size
    rungs = [(cap or "none", None if cap is None else parse_size(cap, whole_bytes=size))
             for cap in caps]  # fmt: skip
    why_not = can_confine()
    if why_not is not None:
        told(f"no memory cgroup here ({why_not}): each process limits its own private memory")
    rows: list[Row] = []
    curves: dict[str, list[DeviceCurve]] = {}
    for cap, n_bytes in rungs:
        rows += _rung(model, cap, n_bytes, tests, repetitions, engine, told)
        storage = rows[-1].facts.get("storage")
        if storage is not None:
            found = curves.setdefault(storage, [])
            found.append(probe_device(model, storage, seconds=PROBE_S, seed=len(found)))
    best = {storage: best_curve(found) for storage, found in curves.items()}
    return same_tokens([_over_floor(row, best.get(row.facts.get("storage"))) for row in rows])


def _over_floor(row: Row, curve: DeviceCurve | None) -> Row:
    """The row with its flash floor by `curve`, the best of all probes of this ladder.

    The one that the engine opened with lasts a third of a second, and a disk that was slow just
    then would flatter every ratio.
    """
    if curve is None or row.failed or not row.reads_per_token:
        return row
    flash = 1e3 * curve.seconds(row.reads_per_token, row.bytes_per_token / row.reads_per_token)
    floors = row.floor_ms | {"flash": flash}
    largest = max(row.floor_ms.values(), default=0.0)
    ratio = row.time_over_floor
    if ratio is not None and max(floors.values()):
        ratio *= largest / max(floors.values())
    facts = row.facts | {"device_bytes_per_s": curve.sequential_bytes_per_s, "curve": curve.name}
    return replace(row, floor_ms=floors, time_over_floor=ratio, facts=facts)


def _rung(model, cap, n_bytes, tests, repetitions, engine, told) -> list[Row]:
    make_cold(model)
    before = cached_bytes(model)
    spec = {
        "model": model, "tests": list(tests), "repetitions": repetitions,
        "engine": engine | ({} if n_bytes is None else {"ram_budget": n_bytes}),
    }  # fmt: skip

    def heard(line: dict[str, Any]) -> None:
        if line["event"] == "run":
            told(f"{cap}: {line['kind']}{line['n']} {line['tokens_per_s'] or 0:.2f} tok/s")

    seen = run_child(
        spec, n_bytes, name="flashllm-bench", timeout=TIMEOUT_S, module="flashllm.benchmark.child",
        sample_s=SAMPLE_S, told=heard,
    )  # fmt: skip
    base = {
        "cap": cap, "cap_bytes": n_bytes, "model": Path(model).name,
        "enforced": _enforced(n_bytes, seen), "facts": _without(seen.event("planned")),
        "peak_rss": seen.peak_rss, "cache_before": before, "cache_after": cached_bytes(model),
        "oom_kills": seen.charges.oom_kills if seen.charges else None,
        "peak_cgroup": seen.charges.peak_bytes if seen.charges else None,
    }  # fmt: skip
    done = seen.event("done")
    if done is not None:
        base |= {"peak_rss": max(seen.peak_rss, done["peak_rss"]),
                 "limit_hits": done["limit_hits"]}  # fmt: skip
    rows = [_row(kind, n, base, seen) for kind, n in tests]
    for row in rows:
        if row.failed:
            told(f"{cap}: {row.test} {row.failed}")
    return rows


def _enforced(n_bytes: int | None, seen: Seen) -> str:
    if n_bytes is None:
        return "no cap"
    return "memory cgroup" if seen.charges is not None else "RLIMIT_DATA"


def _without(line: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (line or {}).items() if key != "event"}


def _row(kind: str, asked: int, base: dict[str, Any], seen: Seen) -> Row:
    samples = tuple(
        _without(line) for line in seen.lines
        if line.get("event") == "run" and (line["kind"], line["asked"]) == (kind, asked)
    )
    if seen.code or not samples:
        return Row(f"{kind}{asked}", **base, failed=_failure(seen), samples=samples)
    n, speeds = samples[0]["n"], [sample["tokens_per_s"] for sample in samples]
    note = "" if n == asked else f"{kind}{asked} shortened to the context"
    return Row(
        f"{kind}{n}", **base, samples=samples, note=note,
        tokens_per_s=statistics.fmean(speeds),
        tokens_per_s_sd=statistics.stdev(speeds) if len(speeds) > 1 else None,
        floor_ms=_means(samples, "floor_ms"), per_token_ms=_means(samples, "per_token_ms"),
        **{name: _mean(samples, name) for name in ("hit_rate", "bytes_per_token", "stall",
                                                   "reads_per_token", "time_over_floor")},
    )  # fmt: skip


def _failure(seen: Seen) -> str:
    refused = seen.event("refused")
    if refused is not None:
        return f"refused: the floor is {refused['floor'] / MIB:.1f} MiB"
    if seen.charges is not None and seen.charges.oom_kills:
        begun = seen.event("planned") is not None
        return "killed by the kernel for memory" + ("" if begun else " before it could plan")
    return f"exit code {seen.code}: {seen.stderr.strip()[-200:]}"


def _mean(samples: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [sample[name] for sample in samples if sample[name] is not None]
    return statistics.fmean(values) if values else None


def _means(samples: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    found = [sample.get(name, {}) for sample in samples]
    return {key: statistics.fmean(one[key] for one in found) for key in found[0]}


def same_tokens(rows: list[Row]) -> list[Row]:
    """A note on every row whose tokens are not those of the first rung's same test."""
    said: dict[str, list[str]] = {}
    out = []
    for row in rows:
        mine = [sample["said"] for sample in row.samples]
        if not row.failed and said.setdefault(row.test, mine) != mine:
            row = replace(row, note="; ".join(filter(None, (row.note, "other tokens"))))
        out.append(row)
    return out
