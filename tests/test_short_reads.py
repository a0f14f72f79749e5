"""Reads that bring 1 to k bytes at random, and interruptions between them, under a whole engine:
the same tokens (R-51).  A preload shim (native/short_reads.c) cuts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from flashllm.conversion.enlarge import inflate
from flashllm.units import MIB

from .patience import patience
from .preload import built
from .tiny import GOLDEN

CHILD = """
import ctypes, json, os, sys
from flashllm import LLM
from flashllm.container import verify

shim = ctypes.CDLL(None)
path, storage, unit, most = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
ask = dict(max_tokens=6, temperature=2.0, seed=1, ignore_eos=True)

def tokens(llm):
    return llm.generate([1, 2, 3], **ask).tokens

engine = dict(ram_budget="300MiB", storage=storage, pin=False, num_threads=1, io_depth=3)
with LLM(path, **engine) as llm:
    expected = tokens(llm)
    shim.short_reads(*map(ctypes.c_ulong, (os.stat(path).st_ino, 1, unit, most)))
    same = [tokens(llm) == expected for _ in range(2)]
    n_cut = shim.short_reads_done()
    if storage == "pread":  # opened, and looked through, in the same weather
        with LLM(path, **engine) as other:
            same.append(tokens(other) == expected)
        same.append(verify(path).ok)
print(json.dumps([same, n_cut]))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return built("short_reads", tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("short") / "m.flash"
    inflate(GOLDEN / "llama-relu", path, size_bytes=1 * MIB, min_layers=2)
    return str(path)


# Past the page cache a read may only stop between blocks of the device.
@pytest.mark.parametrize("storage, unit, most", [("pread", 1, 2000), ("direct", 4096, 3)])
def test_the_same_tokens(shim, model, storage, unit, most):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, model, storage, str(unit), str(most)],
        capture_output=True, text=True, timeout=patience(120),
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "LD_PRELOAD": shim},
    )  # fmt: skip
    if "UnsupportedError" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    same, n_cut = json.loads(done.stdout)
    assert all(same) and n_cut > 500, (same, n_cut)
