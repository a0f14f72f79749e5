"""Libraries of tests/native that stand before a child's own (LD_PRELOAD), built on the spot."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def built(name: str, folder: Path) -> str:
    """tests/native/NAME.c as a library in `folder`; skips where it cannot be built."""
    compiler = shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs gcc and glibc")
    out = folder / f"{name}.so"
    flags = ["-std=c11", "-O1", "-D_GNU_SOURCE=1", "-Wall", "-Wextra", "-shared", "-fPIC"]
    source = f"tests/native/{name}.c"
    done = subprocess.run([compiler, *flags, source, "-o", str(out), "-ldl"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(out)
