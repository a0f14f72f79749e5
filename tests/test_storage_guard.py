"""The SIGBUS guard and its neighbours: a fault that is not ours goes where it went before.

Each case is a process of its own, because it dies or changes signal handlers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from .patience import patience

PRELUDE = """
import faulthandler, mmap, os, sys
from flashllm.errors import FlashReadError
from flashllm.storage import open_storage

size = 16 * mmap.PAGESIZE
ours, other = sys.argv[1:]
for path in (ours, other):
    with open(path, "wb") as file:
        file.write(bytes(size))

def our_fault(storage):
    os.truncate(ours, 0)
    try:
        storage.read(0, size)
    except FlashReadError:
        print("typed error", flush=True)
    os.truncate(ours, size)

def other_fault():
    with open(other, "r+b") as file:
        mapping = mmap.mmap(file.fileno(), size)
    os.truncate(other, 0)
    return mapping[0]
"""

CASES = {
    "no handler before": "s = open_storage('mmap', ours); our_fault(s); other_fault()",
    "faulthandler before": (
        "faulthandler.enable(); s = open_storage('mmap', ours); our_fault(s); other_fault()"
    ),
    "faulthandler between": (
        "s = open_storage('mmap', ours); faulthandler.enable();"
        "t = open_storage('mmap', ours); our_fault(t); our_fault(s); other_fault()"
    ),
    "faulthandler after": (
        "s = open_storage('mmap', ours); faulthandler.enable(); our_fault(s); other_fault()"
    ),
    "after closing": "s = open_storage('mmap', ours); our_fault(s); s.close(); other_fault()",
    "sent by hand": (
        "s = open_storage('mmap', ours); our_fault(s); os.kill(os.getpid(), 7); our_fault(s)"
    ),
}


def run(tmp_path, code):
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(tmp_path / "ours"), str(tmp_path / "other")],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=patience(120),
    )


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_fault_still_kills(tmp_path, case):
    result = run(tmp_path, CASES[case])
    assert "typed error" in result.stdout, result.stderr
    assert result.returncode == -signal.SIGBUS, result.stderr
    if "faulthandler" in case:
        assert "Fatal Python error: Bus error" in result.stderr


def test_an_ignored_signal_stays_ignored(tmp_path):
    code = (
        "import signal; signal.signal(signal.SIGBUS, signal.SIG_IGN)\n"
        "s = open_storage('mmap', ours); our_fault(s)\n"
        "os.kill(os.getpid(), signal.SIGBUS); our_fault(s); print('alive')"
    )
    result = run(tmp_path, code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:3] == ["typed error", "typed error", "alive"]


def test_as_many_mappings_as_there_are_slots_and_one_more(tmp_path):
    code = """
import resource
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, most), most))
files = [open_storage("mmap", ours) for _ in range(1024)]
try:
    open_storage("mmap", ours)
except FlashReadError as error:
    print("refused", error.errno)
files.pop().close()
our_fault(open_storage("mmap", ours))
"""
    result = run(tmp_path, code)
    assert result.stdout.split("\n")[:2] == ["refused 24", "typed error"], result.stderr
