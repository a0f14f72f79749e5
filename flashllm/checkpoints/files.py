"""Opening and reading other people's files: regular ones only, bounded, leaving no page behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import CheckpointError, FlashReadError, FormatError
from ..regular import drop_page_cache, open_regular

READ_PIECE_BYTES = 4 * 2**20  # dropped from the page cache piece by piece
MAX_CONFIG_BYTES = 2**18  # parsed JSON is some 20 times larger; published configs are below 20 KB
MAX_TOKENIZER_BYTES = 2**26  # the largest published tokenizer.json is about half of that


def _open(path: Path) -> int:
    """A read-only descriptor of a regular file; a FIFO, a device or a directory is refused."""
    try:
        return open_regular(path)
    except FormatError as problem:
        raise CheckpointError(path, "file", problem.expected, problem.found) from None
    except FlashReadError as problem:
        raise CheckpointError(path, "file", "a readable file", problem.strerror) from None


class SourceFile:
    """One open regular file: exact reads at offsets, its pages dropped after each."""

    def __init__(self, path: Path):
        self.path = path
        self._file = os.fdopen(_open(path), "rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, n_bytes: int) -> bytearray:
        buffer = bytearray(n_bytes)
        self.read_into(offset, memoryview(buffer))
        return buffer

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` from `offset`; FlashReadError where the file ends or the device fails."""
        done = 0
        while done < len(buffer):
            piece = buffer[done : done + READ_PIECE_BYTES]
            try:
                self._file.seek(offset + done)
                n_read = self._file.readinto(piece)
            except OSError as problem:
                raise FlashReadError(
                    problem.errno or 0, problem.strerror or "", self.path, offset + done
                ) from None
            if not n_read:
                raise FlashReadError(
                    0, f"end of file, {len(buffer) - done} bytes short", self.path, offset + done
                )
            self._drop(offset + done, n_read)
            done += n_read

    def _drop(self, offset: int, n_bytes: int) -> None:
        # Only what lies in the range as a whole is dropped, and read-ahead makes units of up to
        # 2 MiB: without going back over the one that the last range cut, a fifth stayed.
        start = max(0, offset - READ_PIECE_BYTES) & ~4095
        drop_page_cache(self._file.fileno(), start, offset + n_bytes - start)

    def close(self) -> None:
        if not self._file.closed:
            self._drop(0, self.size)  # what read-ahead brought beyond our reads
            self._file.close()


def read_whole(path: Path, limit: int) -> bytes:
    """The content of a small regular file; CheckpointError above `limit` bytes."""
    file = SourceFile(path)
    try:
        if file.size > limit:
            raise CheckpointError(path, "file size", f"at most {limit} bytes", file.size)
        return bytes(file.read(0, file.size))
    finally:
        file.close()


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict:
    """The object in a small JSON file; {} if there is no such file."""
    if not os.path.lexists(path):
        return {}
    try:
        content = json.loads(read_whole(path, limit))
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(path, "content", "JSON", str(problem)[:80]) from None
    if not isinstance(content, dict):
        raise CheckpointError(path, "content", "a JSON object", type(content).__name__)
    return content
