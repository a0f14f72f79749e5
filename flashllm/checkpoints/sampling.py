"""A digest of a file's content that does not read all of it."""

from __future__ import annotations

import hashlib

from .files import SourceFile

_SAMPLES, _SAMPLE_BYTES = 64, 16384


def sample_digest(file: SourceFile) -> bytes:
    """sha256 of the whole of a small file, of blocks all over a large one.

    Two trainings of one model differ nearly everywhere, and a copy of a file differs nowhere: so
    this tells sources apart, and copies convert to the same bytes, which times would prevent.
    """
    if file.size <= _SAMPLES * _SAMPLE_BYTES:
        return hashlib.sha256(file.read(0, file.size)).digest()
    digest = hashlib.sha256()
    for k in range(_SAMPLES):
        digest.update(file.read(k * (file.size - _SAMPLE_BYTES) // (_SAMPLES - 1), _SAMPLE_BYTES))
    return digest.digest()
