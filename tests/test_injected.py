"""Reads that the kernel fails, interrupts or refuses: the n-th, for several n (R-50, R-51).

strace injects into preadv of the model file alone, under a whole engine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from flashllm.conversion.enlarge import inflate
from flashllm.units import MIB

from .patience import patience
from .tiny import GOLDEN

STRACE = shutil.which("strace")


def why_not() -> str | None:
    if STRACE is None:
        return "no strace"
    done = subprocess.run([STRACE, "-qq", "-f", "true"], capture_output=True, text=True)
    return f"strace may not trace here: {done.stderr.strip()}" if done.returncode else None


_reason = why_not()
pytestmark = [
    pytest.mark.kernel, pytest.mark.skipif(_reason is not None, reason=str(_reason))
]  # fmt: skip

CHILD = """
import os, sys
from flashllm import LLM, assembly
from flashllm.errors import FlashReadError
from flashllm.probe.curve import DEFAULT_CURVE

assembly.opening.probe_device = lambda *a, **k: DEFAULT_CURVE  # only the engine's reads count

def descriptors():
    return len(os.listdir("/proc/self/fd"))

ask = dict(max_tokens=4, temperature=2.0, seed=1, ignore_eos=True)
with LLM(sys.argv[1], ram_budget="300MiB", storage="pread", pin=False, io_depth=1) as llm:
    before, errors, answers = descriptors(), 0, []
    for _ in range(4):
        try:
            answers.append(llm.generate([1, 2, 3], **ask).tokens)
        except FlashReadError as error:
            errors += 1
            assert error.errno == 5 and "plane " in error.where, error
    print(errors, answers[-1], len(set(map(tuple, answers))), descriptors() - before)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("injected") / "m.flash"
    inflate(GOLDEN / "llama-relu", path, size_bytes=2 * MIB, min_layers=2)
    return str(path)


def run(model: str, *inject: str) -> list[str]:
    command = [sys.executable, "-c", CHILD, model]
    if inject:
        options = [word for one in inject for word in ("-e", f"inject={one}")]
        command = [STRACE, "-f", "-qq", "-o", "/dev/null", "-P", model, *options, *command]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=patience(120),
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split(" ", 1)


@pytest.fixture(scope="module")
def healthy(model):
    errors, answer = run(model)
    assert errors == "0"
    return answer


@pytest.mark.parametrize(
    "n",
    [1, 2, 9, 40]
    + [pytest.param(n, marks=pytest.mark.long) for n in range(3, 62) if n not in (9, 40)],
)
def test_the_nth_read_fails(model, healthy, n):
    """Twice in a row, so that the one retry of a device error fails as well; then never again.

    A read-ahead that fails before its step begins is asked for again and costs no request.
    """
    errors, answer = run(model, f"preadv:error=EIO:when={n}..{n + 1}")
    assert errors in ("0", "1") if n > 9 else errors == "1"
    assert answer == healthy


def test_one_device_error_is_read_again(model, healthy):
    errors, answer = run(model, "preadv:error=EIO:when=7+50")
    assert errors == "0" and answer == healthy


@pytest.mark.parametrize("error", ["EINTR", "EAGAIN"])
def test_interrupted_and_refused_calls(model, healthy, error):
    errors, answer = run(model, f"preadv:error={error}:when=1+3")
    assert errors == "0" and answer == healthy
