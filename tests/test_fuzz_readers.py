"""Damaged input into every reader of files: a typed error or a result, within 1 s and 16 MiB.

Few and always the same examples here (R-28); `--long` takes many and random ones, and
`python -m tests.fuzz.run_atheris TARGET` follows coverage where atheris installs.
tests/fuzz/corpus holds, one folder per target, the smallest input seen for each way of refusing,
and every find.
"""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashllm.errors import FlashError
from flashllm.units import MIB

from .fuzz.targets import TARGETS, folder_of

CORPUS = Path(__file__).parent / "fuzz/corpus"
NUMBERS = [0, 1, 2, 3, 7, 63, 64, 255, 4096, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63]
WORDS = [b'""', b"[]", b"{}", b"null", b"true", b"-1", b"1e999", b"NaN", b"\xff", b"\0", b"[" * 200]
INSERTED = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(NUMBERS).map(lambda n: str(n).encode()),
    st.binary(min_size=1, max_size=8),
)
WRITTEN = st.one_of(
    st.binary(min_size=1, max_size=4),
    st.sampled_from(NUMBERS).map(lambda n: struct.pack("<Q", n)),
    st.sampled_from(NUMBERS).map(lambda n: struct.pack("<I", n % 2**32)),
)
# Mostly near the front, where headers are; a share in thousandths of the length otherwise.
PLACES = st.one_of(st.integers(0, 200), st.integers(0, 999).map(lambda part: -part))
KINDS = st.sampled_from(["set", "insert", "delete", "cut", "copy"])
EDITS = st.lists(st.tuples(KINDS, PLACES, WRITTEN, INSERTED), min_size=1, max_size=3)


def edited(data: bytes, edits: list) -> bytes:
    for kind, place, written, inserted in edits:
        at = min(place, len(data)) if place >= 0 else len(data) * -place // 1000
        if kind == "set":
            data = data[:at] + written + data[at + len(written) :]
        elif kind == "insert":
            data = data[:at] + inserted + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + len(inserted) :]
        elif kind == "cut":
            data = data[:at]
        else:
            data = data[:at] + data[: at // 2] + data[at:]
    return data


def survives(name: str, data: bytes, folder: Path) -> None:
    """Read `data`; what is not a FlashError, slow or large fails the test."""
    started = time.process_time()
    tracemalloc.start()
    try:
        TARGETS[name].read(data, folder)
    except FlashError as error:
        assert len(str(error)) < 4000
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 16 * MIB, f"{peak} bytes"
    # tracing makes it some four times slower
    assert time.process_time() - started < 4.0


@pytest.mark.parametrize("name", TARGETS)
def test_the_seed_is_read(name, tmp_path):
    TARGETS[name].read(TARGETS[name].seed(), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input(name, tmp_path, rounds):
    seed = TARGETS[name].seed()

    @settings(
        max_examples=rounds(25, 1000), deadline=None, derandomize=rounds(True, False),
        database=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(EDITS)
    def damage(edits) -> None:
        survives(name, edited(seed, edits), tmp_path)

    damage()


FOUND = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", FOUND, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_what_was_found_once(path, tmp_path):
    name = next(name for name in TARGETS if folder_of(name) == path.parent.name)
    survives(name, path.read_bytes(), tmp_path)
