"""Storages that imitate a device that is slow or broken, for tests and simulations.

Both wrap any storage and keep its contract.  SlowStorage is a model of one device with a price per
read and per byte, on an injected clock, so that a test waits for nothing.  FaultyStorage breaks
exactly the extents that its caller points at.
"""

from __future__ import annotations

import ctypes
import errno
import time
from collections.abc import Callable

import numpy as np

from .._core import xxh64
from ..errors import ChecksumError, FlashReadError, UsageError
from .base import Describe, ReadBatch, Storage, Ticket


class _Wrapper(Storage):
    """Everything of `inner`, for a subclass to change a part of."""

    def __init__(self, inner: Storage):
        self.inner = inner
        self.name, self.path, self.size = inner.name, inner.path, inner.size
        self.alignment, self.memory_alignment = inner.alignment, inner.memory_alignment
        self.engine = inner.engine

    def read(self, offset: int, length: int) -> bytes:
        return self.inner.read(offset, length)

    def stats(self) -> dict[str, int]:
        return self.inner.stats()

    def fileno(self) -> int:
        return self.inner.fileno()

    def close(self) -> None:
        self.inner.close()


class SlowStorage(_Wrapper):
    """A device that serves one extent at a time, as they were submitted, at `seconds_per_read` plus
    its bytes over `bytes_per_s`.

    An extent has arrived when the inner storage has read it and its time has come on `clock`
    (seconds); wait() calls `sleep` with what is missing.  read() pays like one extent.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        seconds_per_read: float = 0.0,
        bytes_per_s: float = float("inf"),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        if seconds_per_read < 0 or bytes_per_s <= 0:
            raise UsageError("a slow device has a price per read of 0 or more and a positive rate")
        super().__init__(inner)
        self._price = (seconds_per_read, bytes_per_s)
        self.clock, self.sleep = clock, sleep
        self._busy_until = 0.0

    def _ready(self, lengths: np.ndarray) -> np.ndarray:
        """When each of the next extents will have arrived; the device is busy until the last."""
        per_read, rate = self._price
        start = max(self._busy_until, self.clock())
        ready = start + np.cumsum(per_read + lengths / rate)
        self._busy_until = float(ready[-1]) if len(ready) else self._busy_until
        return ready

    def _forget(self, ready: np.ndarray) -> None:
        """A closed batch at the queue's end gives back the time of what had not begun."""
        now = self.clock()
        if len(ready) and ready[-1] == self._busy_until > now:
            self._busy_until = float(ready[np.searchsorted(ready, now, side="right")])

    def submit(
        self, batch: ReadBatch, describe: Describe | None = None, *, ahead: bool = False
    ) -> Ticket:
        inner = self.inner.submit(batch, describe, ahead=ahead)
        return _SlowTicket(inner, self, self._ready(batch.length))

    def read(self, offset: int, length: int) -> bytes:
        data = self.inner.read(offset, length)
        self.sleep(max(0.0, float(self._ready(np.array([length]))[0]) - self.clock()))
        return data


class _SlowTicket(Ticket):
    def __init__(self, inner: Ticket, storage: SlowStorage, ready: np.ndarray):
        self._inner, self._storage, self._ready = inner, storage, ready

    def wait(self, upto: int | None = None) -> None:
        self._inner.wait(upto)
        upto = len(self._ready) if upto is None else upto
        if upto:
            missing = float(self._ready[upto - 1]) - self._storage.clock()
            if missing > 0:
                self._storage.sleep(missing)

    def done(self) -> int:
        arrived = int(np.searchsorted(self._ready, self._storage.clock(), side="right"))
        return min(self._inner.done(), arrived)

    def close(self) -> None:
        self._storage._forget(self._ready)
        self._inner.close()


# (ordinal, offset, length) -> "fail", "short", "corrupt" or None; the ordinal counts the extents
# (and plain reads) since the storage was opened.
Choose = Callable[[int, int, int], str | None]


class FaultyStorage(_Wrapper):
    """Breaks the extents for which `choose` names a fault.

    "fail": a device error, EIO.  "short": the file ends inside it, ENODATA.  "corrupt": the first
    byte of the first destination is flipped after the read; the extent's checks are then made
    again, so that corruption is silent exactly where nothing checks.
    """

    KINDS = ("fail", "short", "corrupt")

    def __init__(self, inner: Storage, choose: Choose):
        super().__init__(inner)
        self._choose, self._ordinal = choose, 0

    def _fault(self, offset: int, length: int) -> str | None:
        kind = self._choose(self._ordinal, offset, length)
        self._ordinal += 1
        if kind is not None and kind not in self.KINDS:
            raise UsageError(f"a fault is one of {', '.join(self.KINDS)}, not {kind!r}")
        return kind

    def error(self, kind: str, offset: int, where: str) -> FlashReadError:
        code = errno.EIO if kind == "fail" else errno.ENODATA
        return FlashReadError(code, f"injected fault: {kind}", self.path, offset, where)

    def submit(
        self, batch: ReadBatch, describe: Describe | None = None, *, ahead: bool = False
    ) -> Ticket:
        inner = self.inner.submit(batch, describe, ahead=ahead)
        kinds = map(self._fault, batch.offset.tolist(), batch.length.tolist())
        faults = {extent: kind for extent, kind in enumerate(kinds) if kind is not None}
        return _FaultyTicket(inner, self, batch, faults, describe)

    def read(self, offset: int, length: int) -> bytes:
        data = self.inner.read(offset, length)
        kind = self._fault(offset, length)
        if kind in ("fail", "short"):
            raise self.error(kind, offset, "")
        return bytes([data[0] ^ 1]) + data[1:] if kind and data else data


class _FaultyTicket(Ticket):
    def __init__(self, inner, storage, batch, faults, describe):
        self._inner, self._storage, self._batch = inner, storage, batch
        self._faults: dict[int, str] = faults  # in ascending order of extents
        self._errors: dict[int, Exception] = {}
        self._describe = describe or (lambda extent, check: f"extent {extent}")

    def wait(self, upto: int | None = None) -> None:
        limit = len(self._batch) if upto is None else upto
        for extent, kind in self._faults.items():
            if extent >= limit:
                break
            self._inner.wait(extent + 1)
            error = self._break(extent, kind)
            if error is not None:
                raise error
        self._inner.wait(upto)

    def done(self) -> int:
        n = self._inner.done()
        for extent, kind in self._faults.items():
            if extent < n and self._break(extent, kind) is not None:
                return extent
        return n

    def close(self) -> None:
        self._inner.close()

    def _break(self, extent: int, kind: str) -> Exception | None:
        """The error of a faulty extent that the inner storage has read; flips its byte once."""
        if extent not in self._errors:
            offset = int(self._batch.offset[extent])
            if kind == "corrupt":
                self._errors[extent] = self._corrupt(extent, offset)
            else:
                where = self._describe(extent, -1)
                self._errors[extent] = self._storage.error(kind, offset, where)
        return self._errors[extent]

    def _corrupt(self, extent: int, offset: int) -> Exception | None:
        b = self._batch
        first = ctypes.c_ubyte.from_address(int(b.iov_address[b.iov_start[extent]]))
        first.value ^= 1
        for k in range(b.check_start[extent], b.check_start[extent + 1]):
            memory = (ctypes.c_ubyte * int(b.check_length[k])).from_address(int(b.check_address[k]))
            found = xxh64(memory, int(b.check_seed[k]))
            if found != int(b.check_digest[k]):
                check = int(k - b.check_start[extent])
                where = f"{self._describe(extent, check)} at offset {offset}"
                return ChecksumError(self._storage.path, where, int(b.check_digest[k]), found)
        return None
