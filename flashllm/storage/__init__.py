"""Read ranges of a file into given memory: `direct`, `pread`, `mmap`.  The contract is base.py."""

from __future__ import annotations

import os

from .._core import resident_bytes
from ..registry import Registry
from .base import ReadBatch, Storage, Ticket
from .direct import DirectStorage
from .mmap import MmapStorage
from .native import THREADS
from .pread import PreadStorage

__all__ = [
    "STORAGES", "THREADS", "ReadBatch", "Storage", "Ticket", "open_storage", "resident_bytes",
]  # fmt: skip

STORAGES: Registry[type[Storage]] = Registry(
    "storage", {kind.name: kind for kind in (DirectStorage, PreadStorage, MmapStorage)}
)


def open_storage(
    name: str, path: str | os.PathLike, *, depth: int | None = None, engine: str = "threads"
) -> Storage:
    """Open `path` with the backend called `name`, `depth` reads in flight (None: the engine's own),
    by the I/O engine `engine` (native.py): threads or uring.

    Raises UnknownNameError, FormatError (not a regular file), FlashReadError (cannot be opened) and
    UnsupportedError (the file system cannot serve this backend, or the system the engine).
    """
    return STORAGES[name](path, depth=depth, engine=engine)
