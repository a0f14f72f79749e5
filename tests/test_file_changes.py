"""A model file that changes under a running engine (R-54), and no mapping of it (R-08).

In processes of their own: what is promised is that none of them dies of a signal.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from flashllm.conversion.enlarge import inflate
from flashllm.units import MIB

from .patience import patience
from .readers import READERS, settings
from .tiny import GOLDEN


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("changes") / "m.flash"
    inflate(GOLDEN / "llama-relu", path, size_bytes=4 * MIB, min_layers=2)
    return path.read_bytes()


CHILD = """
import os, sys
from flashllm import LLM
from flashllm.errors import FlashError

path, backend, engine, change = sys.argv[1:]
llm = LLM(path, ram_budget="300MiB", storage=backend, io_engine=engine, pin=False)
ask = dict(max_tokens=6, temperature=2.0, seed=1, ignore_eos=True)
before = llm.generate([1, 2, 3], **ask).tokens
stream = llm.stream([1, 2, 3], **ask)
got = list(next(stream).tokens)
size = os.path.getsize(path)
os.chmod(path, 0o600)
if change == "truncated":
    os.truncate(path, size // 2)
elif change == "emptied":
    os.truncate(path, 0)
elif change == "deleted":
    os.unlink(path)
elif change == "replaced":
    with open(path + ".new", "wb") as file:
        file.write(bytes(size))
    os.replace(path + ".new", path)
elif change == "overwritten":
    with open(path, "r+b") as file:
        file.seek(65536)
        file.write(bytes(size - 65536))
elif change == "forbidden":
    os.chmod(path, 0)
try:
    for delta in stream:
        got += delta.tokens
    print("finished", got == before)
except FlashError as error:
    print(type(error).__name__, os.path.basename(path) in str(error))
stream.close()
try:
    print(llm.generate([1, 2, 3], **ask).tokens == before)
except FlashError as error:
    print("again", type(error).__name__)
llm.close()
"""

# change -> first line printed; the second request meets the same file.
CHANGES = {
    "truncated": "FlashReadError True",
    "emptied": "FlashReadError True",
    "overwritten": "ChecksumError True",
    "deleted": "finished True",
    "replaced": "finished True",
    "forbidden": "finished True",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_under_an_engine(tmp_path, content, change, reader):
    path = tmp_path / "model.flash"
    path.write_bytes(content)
    done = run(CHILD, str(path), *settings(reader, path).values(), change)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    first, second = done.stdout.splitlines()
    assert first == CHANGES[change]
    assert second == ("True" if first == "finished True" else f"again {first.split()[0]}")


LIMITED = """
import resource, sys
from flashllm import LLM

path, backend, budget = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open("/proc/self/status") as file:
    size = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmSize"))
limit = size + budget + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
with LLM(path, ram_budget=budget, storage=backend, num_threads=1, io_depth=4) as llm:
    print(len(llm.generate([1, 2, 3], max_tokens=4, ignore_eos=True).tokens))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "m.flash"
    inflate(GOLDEN / "llama-relu", path, size_bytes=128 * MIB)
    return str(path)


@pytest.mark.parametrize("backend", ["direct", "pread"])
def test_no_large_mappings(large, backend):
    """R-08: the interpreter, the budget and 64 MiB of addresses are enough; the file is larger."""
    done = run(LIMITED, large, backend, str(80 * MIB))
    assert done.stdout.strip() == "4", done.stderr


def run(code: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=patience(120),
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
