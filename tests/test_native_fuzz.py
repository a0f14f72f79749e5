"""Random input for the C that takes a file's bytes and numbers, under the sanitizers (R-28).

A short run with fixed seeds; `fuzz_bytes FILE ROUNDS SEED` runs as long as is wanted.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from .patience import patience

ROOT = Path(__file__).parent.parent
NAMES = ("fl_xxh64", "fl_planes", "fl_reader", "fl_blocks", "fl_source", "fl_guard",
         "fl_uring")  # fmt: skip
SOURCES = ["tests/native/fuzz_bytes.c", *(f"ext/{name}.c" for name in NAMES)]


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def program(request, tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    out = tmp_path_factory.mktemp("fuzz") / "fuzz_bytes"
    flags = ["-std=c11", "-g", "-O1", "-D_GNU_SOURCE=1", "-D_FILE_OFFSET_BITS=64", "-Iext", "-Wall",
             f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]  # fmt: skip
    done = subprocess.run(
        [compiler, *flags, *SOURCES, "-o", str(out), "-lpthread"], cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode and "cannot find" in done.stderr:
        pytest.skip(f"no sanitizer library: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return str(out)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_bytes_and_numbers(program, tmp_path, rounds, seed):
    n = rounds(400, 20_000)
    done = subprocess.run(
        [program, str(tmp_path / "file"), str(n), str(seed)], capture_output=True, text=True,
        timeout=patience(0.3 * n),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout == f"{n} rounds\n"
