"""The arena: the one allocation that slots, ring stages and read areas are cut from.

Private anonymous memory, touched once when it is made, so that what the plan says is charged at
once and nothing grows later by itself.  Regions are cut by name when the arena is made and never
move; whole OS pages of them can be given back to the kernel and taken again.  Addresses are plain
ints (uint64 in tables); what lies in a region is not known here.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ..errors import BusyError, ClosedError, UsageError
from ..units import align_up

REGION_ALIGNMENT = 4096  # an O_DIRECT target is happy with any multiple of 512; a page is tidier


@dataclass(frozen=True)
class Region:
    """A named piece of the arena: `n_bytes` from `address`."""

    name: str
    address: int
    n_bytes: int


def arena_bytes(sizes: Mapping[str, int]) -> int:
    """Bytes that an arena of these regions is charged: each region rounded up to whole pages."""
    return sum(align_up(n, REGION_ALIGNMENT) for n in sizes.values())


class Arena:
    """One mapping cut into page-aligned regions.

    sizes       region name -> bytes (zero is allowed and gets an address nobody may touch)
    huge_pages  ask for transparent huge pages.  The kernel only places them where 2 MiB lie
                wholly inside the mapping, and the mapping is not rounded up to them, so they
                never charge more than `arena_bytes`.
    touched     region name -> its first bytes, where not all of it is touched: the rest is address
                space, until `take`
    """

    def __init__(
        self, sizes: Mapping[str, int], *, huge_pages: bool = True,
        touched: Mapping[str, int] | None = None,
    ):  # fmt: skip
        for name, n in sizes.items():
            if n < 0:
                raise UsageError(f"arena region {name!r} of {n} bytes")
        self.n_bytes = arena_bytes(sizes)
        self._n_leases = 0
        if hasattr(mmap, "MAP_PRIVATE"):
            # mmap's default, MAP_SHARED, would be shmem: charged as page cache, shared over fork.
            kind = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
        else:
            kind = {}
        self._map: mmap.mmap | None = mmap.mmap(-1, max(self.n_bytes, REGION_ALIGNMENT), **kind)
        self.huge_pages = huge_pages and _advise_huge(self._map)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.address = int(self._bytes.ctypes.data)
        self.regions: dict[str, Region] = {}
        at = self.address
        for name, n in sizes.items():
            self.regions[name] = Region(name, at, n)
            at += align_up(n, REGION_ALIGNMENT)
        at_first = {n: align_up(size, REGION_ALIGNMENT) for n, size in sizes.items()}
        for name, n in (touched or {}).items():
            if n > sizes[name]:
                raise AssertionError(f"{n} bytes touched of region {name!r} of {sizes[name]}")
            if n < sizes[name]:  # before anything is touched: no huge page may reach there
                at_first[name] = align_up(n, REGION_ALIGNMENT)
                rest = at_first[name], align_up(sizes[name], REGION_ALIGNMENT)
                start = self.regions[name].address - self.address
                self._advise(start + rest[0], rest[1] - rest[0], "MADV_NOHUGEPAGE")
        for name, n in at_first.items():
            self.view(self.regions[name].address, n).fill(0)

    def __getitem__(self, name: str) -> Region:
        return self.regions[name]

    def view(self, address: int, n_bytes: int) -> np.ndarray:
        """uint8[n_bytes] over arena memory from `address`; valid until close()."""
        if self._map is None:
            raise ClosedError("the arena is closed")
        start = int(address) - self.address
        if start < 0 or n_bytes < 0 or start + n_bytes > self.n_bytes:
            raise AssertionError(
                f"view of {n_bytes} bytes at arena offset {start}, the arena has {self.n_bytes}"
            )
        return self._bytes[start : start + n_bytes]

    def give_back(self, address: int, n_bytes: int) -> int:
        """Return the whole OS pages inside this range to the kernel; their content is lost.

        Bytes given back; 0 where the kernel has no such call.  The range also stops being a place
        for huge pages, or the kernel might fill it again while joining the pages around it.
        """
        start, length = self._pages(address, n_bytes)
        if length and self._advise(start, length, "MADV_DONTNEED"):
            self._advise(start, length, "MADV_NOHUGEPAGE")
            return length
        return 0

    def take(self, address: int, n_bytes: int) -> None:
        """Touch a range that was given back or reserved, so that it is charged now."""
        start, length = self._pages(address, n_bytes)
        if length:
            if self.huge_pages:
                self._advise(start, length, "MADV_HUGEPAGE")
            self._bytes[start : start + length].fill(0)

    def _pages(self, address: int, n_bytes: int) -> tuple[int, int]:
        """(arena offset, length) of the whole OS pages in a range of the arena."""
        self.view(address, n_bytes)
        start = align_up(int(address) - self.address, mmap.PAGESIZE)
        stop = (int(address) + n_bytes - self.address) // mmap.PAGESIZE * mmap.PAGESIZE
        return start, max(0, stop - start)

    def _advise(self, start: int, length: int, advice: str) -> bool:
        if not length or not hasattr(mmap, advice):
            return False
        try:
            self._map.madvise(getattr(mmap, advice), start, length)
        except OSError:  # a kernel built without huge pages refuses advice about them
            return False
        return True

    def lease(self) -> None:
        """Somebody outside holds addresses; close() is refused until as many release()s."""
        self._n_leases += 1

    def release(self) -> None:
        if self._n_leases < 1:
            raise AssertionError("arena released more often than leased")
        self._n_leases -= 1

    def check(self) -> None:
        """Regions lie inside, in order, page-aligned, without overlap."""
        if self._map is None:
            raise AssertionError("check of a closed arena")
        end = self.address
        for region in self.regions.values():
            if region.address != end or region.address % REGION_ALIGNMENT:
                raise AssertionError(f"region {region} should start at {end:#x}")
            end = region.address + align_up(region.n_bytes, REGION_ALIGNMENT)
        if end != self.address + self.n_bytes or self._n_leases < 0:
            raise AssertionError(
                f"regions end at {end:#x}, the arena at {self.address + self.n_bytes:#x}; "
                f"{self._n_leases} leases"
            )

    def close(self) -> None:
        """Give the memory back; idempotent.  BusyError while leased.

        Views handed out keep the mapping alive until they are gone: memory is never pulled from
        under one.
        """
        if self._map is None:
            return
        if self._n_leases:
            raise BusyError(f"the arena has {self._n_leases} leases out")
        mapping, self._map = self._map, None
        self._bytes = np.empty(0, dtype=np.uint8)
        with suppress(BufferError):  # a view is still out: the mapping goes with it
            mapping.close()


def _advise_huge(mapping: mmap.mmap) -> bool:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them: ordinary pages are only slower
        return False
    return True
