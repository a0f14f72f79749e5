"""Peaks of this process's memory as the kernel tells them, for results and footers."""

from __future__ import annotations

from .probe.process import group_charge, process_memory


class MemoryWatch:
    """`sample()` now and then; `peaks()` has the largest seen, and how often the group's limit was
    hit since this watch was made (None outside a memory cgroup).

    The kernel keeps the high-water mark of RSS and of the group itself; of anonymous and mapped
    memory it tells only the present, so their peaks are those of the samples.
    """

    def __init__(self):
        self._peak_anon = 0
        self._peak_mapped = 0
        charge = group_charge()
        self._hits_before = charge.limit_hits if charge is not None else None
        self.sample()

    def sample(self) -> None:
        now = process_memory()
        self._peak_anon = max(self._peak_anon, now.rss_anon)
        self._peak_mapped = max(self._peak_mapped, now.rss_file)

    def rss(self) -> int:
        return process_memory().rss

    def peaks(self) -> dict[str, int | None]:
        charge = group_charge()
        hits = charge.limit_hits if charge is not None else None
        since = None if hits is None or self._hits_before is None else hits - self._hits_before
        return {
            "peak_anon": self._peak_anon,
            "peak_mapped": self._peak_mapped,
            "peak_rss": process_memory().peak_rss,
            "peak_cgroup": charge.max_usage if charge is not None else None,
            "limit_hits": since,
        }
