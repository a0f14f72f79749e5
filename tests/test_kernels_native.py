"""The C side without Python: other processors under emulation, and the sanitizers.

Needs compilers and qemu-user that a plain machine lacks: what is missing is a skip with its reason.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import tiny
from .patience import patience

ROOT = Path(__file__).parent.parent
SHARED = ("fl_ops", "fl_rwkv", "fl_pool", "fl_quant", "fl_dispatch")
SOURCES = [f"ext/{name}.c" for name in SHARED]
SOURCES += [f"ext/{name}.c" for name in ("serial", "avx2", "avx512", "neon")]
FLAGS = ["-std=c11", "-g", "-D_GNU_SOURCE=1", "-Iext", "-Wall", "-Wextra", "-Werror",
         "-Wno-unused-parameter", "-Wno-unused-function"]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.kernel]
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86-64 machines")


def need(*tools):
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def build(directory, compiler, *flags, name="compare_sets"):
    program = directory / name
    sources = [f"tests/native/{name}.c", *SOURCES]
    command = [compiler, *FLAGS, *flags, *sources, "-o", str(program), "-lm", "-lpthread"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(300))
    assert done.returncode == 0, done.stderr
    return str(program)


def run(*command):
    environ = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environ,
                          timeout=patience(300))  # fmt: skip


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory):
    need("aarch64-linux-gnu-gcc", "qemu-aarch64")
    return build(tmp_path_factory.mktemp("arm"), "aarch64-linux-gnu-gcc", "-O1", "-static")


def test_neon_agrees_with_serial(aarch64):
    done = run("qemu-aarch64", aarch64, "neon")
    assert done.returncode == 0 and "neon: 0 failures" in done.stdout, done.stdout


def test_neon_wants_dot_products(aarch64):
    done = run("qemu-aarch64", "-cpu", "cortex-a53", aarch64, "neon")
    assert done.returncode == 101 and "dot-product" in done.stdout


@pytest.fixture(scope="module")
def x86(tmp_path_factory):
    need("gcc", "qemu-x86_64")
    return build(tmp_path_factory.mktemp("x86"), "gcc", "-O0", "-static")


@on_x86
@pytest.mark.parametrize(
    "processor, name, answer",
    [("Nehalem", "serial", "0 failures"), ("Nehalem", "avx2", "lacks AVX2"),
     ("Nehalem", "avx512", "lacks AVX2"), ("max", "avx2", "0 failures"),
     ("max", "avx512", "lacks AVX-512")],
)  # fmt: skip
def test_lesser_processors_get_what_they_can_run(x86, processor, name, answer):
    done = run("qemu-x86_64", "-cpu", processor, x86, name)
    assert answer in done.stdout, (done.returncode, done.stdout, done.stderr)


@on_x86
def test_a_processor_that_says_more_than_the_system_saves(tmp_path):
    """Detection with made-up CPUID answers and XCR0, a table in native/dispatch.c (R-77)."""
    need("gcc")
    done = run(build(tmp_path, "gcc", "-O0", name="dispatch"))
    assert done.returncode == 0, done.stdout


# processor -> the set that runs there; qemu emulates AVX2 and no AVX-512
PROCESSORS = {
    "Nehalem": "serial",
    "SandyBridge": "serial",
    "Haswell": "avx2",
    "Skylake-Server": "avx2",
    "max": "avx2",
}


@on_x86
@pytest.mark.long
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_whole_engine_on_a_lesser_processor(tmp_path, processor):
    """Interpreter, NumPy and engine under emulation: the best set that runs there, the same tokens
    as that set gives here, no illegal instruction."""
    need("qemu-x86_64")
    model = tiny.container(tmp_path, tokenizer=False)
    command = [sys.executable, "-m", "flashllm", "generate", str(model), "--token-ids", "1,2,3",
               "--max-tokens", "8", "--temperature", "0", "--ignore-eos", "--json",
               "--ram-budget", "1GiB", "--storage", "pread"]  # fmt: skip
    emulated = run("qemu-x86_64", "-cpu", processor, *command)
    assert emulated.returncode == 0, emulated.stderr
    told = json.loads(emulated.stdout)
    assert told["flash"]["kernels"] == PROCESSORS[processor]
    here = json.loads(run(*command, "--kernels", told["flash"]["kernels"]).stdout)
    assert here["tokens"] == told["tokens"]


@on_x86
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path, kind):
    need("gcc")
    flags = ["-O0", f"-fsanitize={kind}", "-fno-sanitize-recover=all"]
    program = build(tmp_path, "gcc", *flags)
    for name in ("serial", "avx2", "avx512"):
        done = run(program, name)
        if done.returncode == 101:
            continue  # this machine cannot run the set
        assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
