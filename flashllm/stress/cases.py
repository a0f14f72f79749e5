"""What is run, and what counts as a breach.

Every case is a fresh process.  Its tokens are compared with those of a process without a limit; a
cap below the stated floor must be refused with exit code 4, which is a promise too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import FlashError
from ..units import MIB
from .confine import Seen, cached_bytes, make_cold, make_warm, run_child

KINDS = ("caps", "refusal", "lowered", "context", "prompts", "together")  # in their order
SHARES = (0.5, 0.25, 0.125)
BACKENDS = ("direct", "pread", "mmap")
LOWERED_TO = 0.7
# The floor counts the process itself, which differs from run to run by what of its libraries is
# mapped: 1.4 MiB between twelve runs.
STEP = 2 * MIB
# What an interpreter that has imported this takes to refuse anything (25 MiB of its own); in less
# the kernel ends it before it can say so.
LEAST_CAP = 32 * MIB
UNLIMITED = "64GiB"  # as a budget: everything is kept, nothing is enforced
MAX_GROWTH = 4 * MIB  # of memory over many prompts
# Of a soak's last quarter against its first, in tokens per CPU second: who else runs on the machine
# halves the tokens of a second of wall time, and a second hyperthread nearly those of a CPU second.
MIN_PACE = 0.5
MAX_CACHED = 4 * MIB  # of the model in the page cache after a cold run with `direct`


@dataclass(frozen=True)
class Scale:
    """How much to do: seconds and tokens of one cell, and the sizes of the special cases."""

    seconds: float
    tokens: int
    n_context: int
    prompts: int
    every_cell: bool  # all caps x backends x cache states, or each of them once

    @classmethod
    def of(cls, seconds: float, quick: bool) -> Scale:
        """A share of the time for each of about 30 (10) cells; the rest is start and loading."""
        if quick:
            return cls(seconds / 40, 32, 128, 60, False)
        return cls(seconds / 60, 200, 512, 1000, True)


@dataclass(frozen=True)
class Row:
    """One line of the table; `breaches` is empty when every promise was kept."""

    case: str
    storage: str
    cache: str
    cap: int
    peak_rss: int = 0
    peak_anon: int = 0
    peak_mapped: int = 0
    cgroup_peak: int | None = None
    failcnt: int | None = None  # since the plan
    oom_kills: int | None = None
    identical: bool | None = None
    tokens_per_s: float | None = None
    n_samples: int = 0
    note: str = ""
    breaches: tuple[str, ...] = ()
    bins: tuple[dict[str, Any], ...] = ()  # of a soak: every twentieth of its time

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Stress:
    """Runs the cases over one model; `told(row)` hears of each as it ends."""

    def __init__(
        self, model: str, *, small: str, scale: Scale, told: Callable[[Row], None]
    ):  # fmt: skip
        self._model, self._small, self._scale, self._told = model, small, scale, told
        self._bytes = Path(model).stat().st_size
        self.rows: list[Row] = []

    def run(self, only: Collection[str] = KINDS) -> list[Row]:
        # What passes through the page cache is in the plan, so the floor depends on the backend.
        floors = {storage: self._floor(storage=storage) for storage in BACKENDS}
        floor = floors["direct"]
        whole = self._reference(self._spec("stream"))["tokens"]
        if "caps" in only:
            for cap, storage, cache in self._cells(floors):
                self._cell(cap, storage, cache, floors[storage], whole)
        kinds = {
            "refusal": lambda: self._refusal(floor),
            "lowered": lambda: self._lowered(floor, whole),
            "context": self._long_context,
            "prompts": self._prompts,
            "together": lambda: self._together(floor, whole),
        }
        for kind, run in kinds.items():
            if kind in only:
                run()
        return self.rows

    def soak(self, seconds: float) -> list[Row]:
        """One engine at half of the model for `seconds`; memory and speed must stay flat."""
        cap = max(self._bytes // 2, self._floor() + 24 * MIB)
        make_cold(self._model)
        spec = self._spec("soak", cap, storage="direct") | {"soak": seconds}
        seen = run_child(spec, cap, timeout=seconds + 600)
        breaches, row = _died(seen), self._row("soak", cap, "direct", "cold", seen)
        if not breaches:
            speed, told = _soaked(seen.report)
            breaches += told
            row = replace(
                row, tokens_per_s=speed, note=_course(seen.report), bins=tuple(seen.report["bins"])
            )
        same = seen.code == 0 and "tokens" not in seen.report["changed"]
        self._add(row, breaches, identical=same)
        return self.rows

    # ------------------------------------------------------------------------------------- cases

    def _cells(self, floors: dict[str, int]) -> list[tuple[int, str, str]]:
        shares = [max(int(self._bytes * share), LEAST_CAP) for share in SHARES]
        least = [(floors[storage] + STEP, storage) for storage in BACKENDS]
        if self._scale.every_cell:
            cells = [(cap, storage) for cap in shares for storage in BACKENDS] + least
            return [(*cell, cache) for cell in cells for cache in ("cold", "warm")]
        caches = ("cold", "warm", "cold")
        once = list(zip(shares, BACKENDS, caches, strict=True))
        return once + [(*cell, cache) for cell, cache in zip(least, caches[1:] + ("warm",),
                                                             strict=True)]  # fmt: skip

    def _cell(self, cap: int, storage: str, cache: str, floor: int, whole: list[int]) -> None:
        (make_cold if cache == "cold" else make_warm)(self._model)
        seen = run_child(self._spec("stream", cap, storage=storage), cap)
        row = self._row("cap", cap, storage, cache, seen)
        if cap < floor:
            self._add(_refused(row, seen))
            return
        breaches = _compare(seen, whole)
        if cache == "cold" and storage == "direct" and cached_bytes(self._model) > MAX_CACHED:
            breaches.append("the page cache holds the model")
        self._add(row, breaches, identical=not breaches)

    def _refusal(self, floor: int) -> None:
        cap = floor - STEP
        seen = run_child(self._spec("stream", cap), floor)
        self._add(_refused(self._row("below the floor", cap, "auto", "warm", seen), seen))

    def _lowered(self, floor: int, whole: list[int]) -> None:
        cap = max(self._bytes // 2, floor + 24 * MIB)
        make_cold(self._model)
        spec = self._spec("stream", cap, storage="direct") | {"resize": int(cap * LOWERED_TO)}
        seen = run_child(spec, cap)
        breaches, told = _compare(seen, whole), seen.event("resized")
        if told is None:
            breaches.append("never resized")
        else:
            if seen.late_rss > told["ram_budget"]:
                breaches.append(f"RSS {seen.late_rss} after lowering")
            if seen.lowered_s == float("inf"):
                breaches.append("the kernel refused the lower limit")
        row = self._row("lowered mid-run", cap, "direct", "cold", seen)
        note = f"to {told['ram_budget'] // MIB} MiB" if told else ""
        self._add(replace(row, note=note), breaches, identical=not _compare(seen, whole))

    def _long_context(self) -> None:
        engine = {"n_context": self._scale.n_context}
        free = self._reference(self._spec("long context", **engine))
        cap = max(self._bytes // 2, self._floor(**engine) + STEP)
        make_cold(self._model)
        seen = run_child(self._spec("long context", cap, storage="direct", **engine), cap)
        breaches = _compare(seen, free["tokens"])
        if seen.code == 0 and not seen.report["overlong_refused"]:
            breaches.append("a prompt beyond the context was computed")
        row = self._row("long context", cap, "direct", "cold", seen)
        note = f"{self._scale.n_context} tokens, speed of the prompt"
        self._add(replace(row, note=note), breaches, identical=not breaches)

    def _prompts(self) -> None:
        spec = {"work": "prompts", "model": self._small, "prompts": self._scale.prompts}
        free = self._reference(spec | {"engine": {"ram_budget": UNLIMITED}})
        cap = self._floor(model=self._small) + STEP
        engine = {"ram_budget": cap, "storage": "direct"}
        seen = run_child(spec | {"engine": engine}, cap)
        breaches = _died(seen)
        same = not breaches and seen.report["digest"] == free["digest"]
        if not breaches and not same:
            breaches.append("tokens differ")
        if not breaches and seen.report["growth"] > MAX_GROWTH:
            breaches.append(f"memory grew by {seen.report['growth']}")
        row = self._row("short prompts", cap, "direct", "warm", seen)
        note = f"{self._scale.prompts} prompts, bundled model"
        self._add(replace(row, note=note), breaches, identical=same)

    def _together(self, floor: int, whole: list[int]) -> None:
        cap = max(self._bytes // 4, floor + STEP)
        make_cold(self._model)
        spec = self._spec("stream", cap, storage="direct")
        with ThreadPoolExecutor(4) as pool:
            runs = [
                pool.submit(run_child, spec, cap, name=f"flashllm-stress-{i}") for i in range(4)
            ]
            for i, future in enumerate(runs, start=1):
                seen = future.result()
                breaches = _compare(seen, whole)
                row = self._row(f"four at once ({i})", cap, "direct", "cold", seen)
                self._add(row, breaches, identical=not breaches)

    # ---------------------------------------------------------------------------------- plumbing

    def _spec(self, work: str, budget: int | str = UNLIMITED, **engine: Any) -> dict[str, Any]:
        return {
            "work": work, "model": self._model, "engine": {"ram_budget": budget, **engine},
            "tokens": self._scale.tokens, "seconds": self._scale.seconds,
        }  # fmt: skip

    def _reference(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The report of an unlimited run; nothing can be judged without one."""
        seen = run_child(spec | {"seconds": 4 * self._scale.seconds}, None)
        if seen.code:
            raise FlashError(f"the run without a limit ended with {seen.code}: {seen.stderr}")
        return seen.report

    def _floor(self, *, model: str | None = None, **engine: Any) -> int:
        """The floor as a child in a group of its own states it."""
        engine = {"ram_budget": 1, "storage": "direct", **engine}
        spec = {"work": "stream", "model": model or self._model, "engine": engine}
        seen = run_child(spec, 512 * MIB)
        told = seen.event("refused")
        if told is None:
            raise FlashError(f"a budget of one byte was not refused: {seen.code}, {seen.stderr}")
        return told["floor"]

    def _row(self, case: str, cap: int, storage: str, cache: str, seen: Seen) -> Row:
        report, charges = seen.report, seen.charges
        flash = report.get("flash", {})
        return Row(
            case, storage, cache, cap,
            peak_rss=max(seen.peak_rss, report.get("peak_rss", 0)), peak_anon=seen.peak_anon,
            peak_mapped=seen.peak_mapped, n_samples=seen.n_samples,
            cgroup_peak=charges.peak_bytes if charges else None,
            # Without a group of its own, whoever shares the child's group may have hit the limit.
            failcnt=flash.get("limit_hits") if charges else None,
            oom_kills=charges.oom_kills if charges else None,
            tokens_per_s=report.get("tokens_per_s"),
        )  # fmt: skip

    def _add(self, row: Row, breaches: list[str] | None = None, **known: Any) -> None:
        if breaches is not None:
            row = replace(row, breaches=(*_judge(row), *breaches), **known)
        self.rows.append(row)
        self._told(row)


def _judge(row: Row) -> list[str]:
    """The breaches that memory alone shows."""
    found = []
    if row.peak_rss > row.cap:
        found.append(f"RSS {row.peak_rss} above the cap")
    if row.oom_kills:
        found.append(f"{row.oom_kills} kills by the kernel")
    # Lowering the limit itself is counted as a hit by the kernel.
    if row.storage == "direct" and row.failcnt and row.case != "lowered mid-run":
        found.append(f"limit hit {row.failcnt} times")
    return found


def _soaked(report: dict[str, Any]) -> tuple[float, list[str]]:
    """(tokens/s, breaches) of a soak.  The first twentieth is when memory finds its level."""
    bins = [b for b in report["bins"] if b["tokens"]]
    breaches = [f"{name} changed" for name in report["changed"]]
    grown = _last_quarter(bins, "rss") - max(b["rss"] for b in bins[1:5])
    if grown > MAX_GROWTH:
        breaches.append(f"memory grew by {grown}")
    early, late = (
        sum(b["tokens"] for b in some) / sum(b["cpu_s"] for b in some)
        for some in (bins[1:5], bins[-5:])
    )
    if late < MIN_PACE * early:
        breaches.append(f"slower: {early:.2f} tokens per CPU second, then {late:.2f}")
    return sum(b["tokens"] for b in bins) / sum(b["seconds"] for b in bins), breaches


def _last_quarter(bins: list[dict[str, Any]], name: str) -> int:
    return max(b[name] for b in bins[-5:])


def _course(report: dict[str, Any]) -> str:
    """Memory at the start, in the middle and at the end."""
    bins = [b for b in report["bins"] if b["tokens"]]
    parts = bins[1:5], bins[len(bins) // 2 - 2 : len(bins) // 2 + 2], bins[-5:]
    rss, anon, charge = (
        " ".join(f"{max(b[name] for b in part) / MIB:.1f}" for part in parts)
        for name in ("rss", "anon", "charge")
    )
    return (f"{report['rounds']} rounds, MiB at start, middle, end: "
            f"RSS {rss}, anon {anon}, group {charge}")  # fmt: skip


def _died(seen: Seen) -> list[str]:
    return [f"exit code {seen.code}: {seen.stderr.strip()[-200:]}"] if seen.code else []


def _compare(seen: Seen, whole: list[int]) -> list[str]:
    if seen.code:
        return _died(seen)
    tokens = seen.report["tokens"]
    n = min(len(tokens), len(whole))
    return [] if n and tokens[:n] == whole[:n] else ["tokens differ"]


def _refused(row: Row, seen: Seen) -> Row:
    told = seen.event("refused")
    if seen.code == 4 and told is not None:
        return replace(row, note=f"refused, floor {told['floor'] / MIB:.1f} MiB")
    return replace(row, breaches=(f"not refused: exit code {seen.code}",))
