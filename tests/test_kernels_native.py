"""The C side without Python: other processors under emulation, and the sanitizers.

Needs compilers and qemu-user that a plain machine lacks: what is missing is a skip with its reason.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ("fl_ops", "fl_rwkv", "fl_pool", "fl_quant", "fl_dispatch")
SOURCES = ["tests/native/compare_sets.c"] + [f"ext/{name}.c" for name in SHARED]
SOURCES += [f"ext/{name}.c" for name in ("serial", "avx2", "avx512", "neon")]
FLAGS = ["-std=c11", "-g", "-D_GNU_SOURCE=1", "-Iext", "-Wall", "-Wextra", "-Werror",
         "-Wno-unused-parameter", "-Wno-unused-function"]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.kernel]
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86-64 machines")


def need(*tools):
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def build(directory, compiler, *flags):
    program = directory / "compare_sets"
    command = [compiler, *FLAGS, *flags, *SOURCES, "-o", str(program), "-lm", "-lpthread"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return str(program)


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


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
