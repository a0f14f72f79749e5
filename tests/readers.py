"""The ways to read that tests run over: every backend, and `direct` by each I/O engine."""

from __future__ import annotations

import pytest

from flashllm.errors import UnsupportedError
from flashllm.storage import Storage, open_storage

# name -> (storage, io_engine)
READERS = {
    "direct": ("direct", "threads"),
    "ring": ("direct", "uring"),
    "pread": ("pread", "threads"),
    "mmap": ("mmap", "threads"),
}


def opened(reader: str, path, **options) -> Storage:
    """`path` opened as READERS says; skips where this machine cannot."""
    storage, engine = READERS[reader]
    try:
        return open_storage(storage, path, engine=engine, **options)
    except UnsupportedError as error:
        pytest.skip(str(error))


def settings(reader: str, path) -> dict[str, str]:
    """The same as arguments of an engine that reads `path`."""
    storage, engine = READERS[reader]
    opened(reader, path, depth=1).close()
    return {"storage": storage, "io_engine": engine}
