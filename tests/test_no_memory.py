"""Allocations that fail, one after the other, under a whole engine (R-12).

A child process with a preload shim (native/fail_alloc.c) opens a model, generates and closes it,
again and again, each time with a later allocation refused: MemoryError or tokens, never an abort,
and the same handle, or a new one, works afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from . import tiny
from .patience import patience
from .preload import built

CHILD = """
import ctypes, gc, json, sys
from flashllm import LLM
from flashllm.errors import FlashError

shim = ctypes.CDLL(None)
path, kind = sys.argv[1], int(sys.argv[2])
ask = dict(max_tokens=3, temperature=0, ignore_eos=True)
engine = dict(ram_budget="300MiB", storage="pread", pin=False, num_threads=2, io_depth=2)

def opened():
    return LLM(path, **engine)

with opened() as llm:
    expected = llm.generate([1, 2, 3], **ask).tokens
refused = answered = n = 0
fired = True
while fired and n < 400:
    n += 1 if n < 12 else 5  # the first ones are those of opening and threads: each of them
    llm = None
    shim.fail_nth(kind, ctypes.c_long(n))
    try:
        llm = opened()
        tokens = llm.generate([1, 2, 3], **ask).tokens
        assert tokens == expected, tokens
        answered += 1
    except (MemoryError, FlashError):
        refused += 1
    fired = shim.fail_fired()
    shim.fail_nth(0, ctypes.c_long(0))
    llm = llm or opened()
    assert llm.generate([1, 2, 3], **ask).tokens == expected
    llm.store.check()
    llm.close()
print(json.dumps([n, bool(fired), refused, answered]))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return built("fail_alloc", tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize("kind", ["ours", pytest.param("large", marks=pytest.mark.long)])
def test_the_nth_allocation_fails(shim, tmp_path, kind):
    # Without a tokenizer: the tokenizers library aborts when it is refused memory.
    model = tiny.container(tmp_path, "llama-relu", tokenizer=False)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(model), {"ours": "1", "large": "2"}[kind]],
        capture_output=True, text=True, timeout=patience(120),
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "LD_PRELOAD": shim},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
    n, fired, refused, answered = json.loads(done.stdout)
    assert n > 30 and not fired and refused > 10 and answered > 0, done.stdout
