"""A cold page cache, and the proof that it is cold (mincore)."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np


def evict(path: str | os.PathLike) -> None:
    """Drop the file's clean pages from the page cache (POSIX_FADV_DONTNEED after a sync)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def n_resident_pages(path: str | os.PathLike) -> int:
    """Pages of the file that are in the page cache now."""
    size = Path(path).stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        present = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size),
            ctypes.c_void_p(present.ctypes.data),
        )  # fmt: skip
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return int(np.count_nonzero(present & 1))
