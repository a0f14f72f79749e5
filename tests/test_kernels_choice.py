"""Choosing a set, its threads, and forks."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from flashllm.errors import UnknownNameError, UnsupportedError, UsageError
from flashllm.kernels import KERNELS, choose_kernels, kernel_troubles
from flashllm.settings import resolve

from .kernel_planes import NATIVE, MemoryPlane, normal, same_bits
from .patience import patience


def test_the_table_says_what_runs_here_and_why_not():
    troubles = kernel_troubles()
    assert set(troubles) == set(KERNELS) == {"avx512", "avx2", "neon", "serial", "reference"}
    assert troubles["serial"] is None and troubles["reference"] is None
    for name, why in troubles.items():
        if why is None:
            ks = choose_kernels(name, n_threads=1)
            assert ks.name == name
            ks.close()
        else:
            with pytest.raises(UnsupportedError, match=name):
                choose_kernels(name)


def test_auto_is_the_best_that_runs():
    best = next(name for name, why in kernel_troubles().items() if why is None)
    assert choose_kernels().name == choose_kernels("auto").name == best != "reference"


def test_the_environment_forces_one_and_an_argument_wins():
    environ = {"FLASHLLM_KERNELS": "serial"}
    with_env = choose_kernels(resolve("kernels", None, environ).value)
    assert with_env.name == "serial"
    assert choose_kernels(resolve("kernels", "reference", environ).value).name == "reference"
    with pytest.raises(UnknownNameError, match="avx3"):
        choose_kernels(resolve("kernels", None, {"FLASHLLM_KERNELS": "avx3"}).value)


@pytest.mark.parametrize("n_threads", [0, -1, 257, 1.5, True])
def test_thread_counts_are_checked(n_threads):
    with pytest.raises(UsageError, match="n_threads"):
        choose_kernels("serial", n_threads=n_threads)


def problem():
    plane = MemoryPlane(normal((500, 512)), "int8")
    return plane, normal((4, 512), 1)


def solve(ks, plane, x):
    acts, out = ks.activations(4, 512), np.empty((4, 500), dtype=np.float32)
    ks.prepare(acts, x, plane.piece)
    ks.dot_range(acts, plane.addresses, plane.piece, 0, 500, out)
    return out


@pytest.mark.parametrize("name", NATIVE)
def test_many_small_calls_in_a_row(name):
    """The pool's hand-over, with and without time for the workers to fall asleep."""
    ks = choose_kernels(name, n_threads=4)
    plane, x = problem()
    expected = solve(ks, plane, x)
    for _ in range(200):
        assert same_bits(solve(ks, plane, x), expected)
    ks.close()


def test_several_threads_may_share_a_set():
    ks = choose_kernels("serial", n_threads=3)
    plane, x = problem()
    expected = solve(ks, plane, x)
    failures = []

    def work():
        for _ in range(20):
            if not same_bits(solve(ks, plane, x), expected):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_the_same_bits():
    code = """
import os, sys
from tests.test_kernels_choice import choose_kernels, problem, same_bits, solve
ks = choose_kernels("serial", n_threads=3)
plane, x = problem()
expected = solve(ks, plane, x)
pid = os.fork()
if pid == 0:
    good = same_bits(solve(ks, plane, x), expected)
    ks.close()
    os._exit(0 if good else 1)
sys.exit(os.waitpid(pid, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=patience(120), cwd=os.getcwd())
    assert done.returncode == 0


def test_an_interpreter_that_ends_with_threads_alive_ends_cleanly():
    code = """
from flashllm.kernels import choose_kernels
from tests.test_kernels_choice import problem, solve
ks = choose_kernels("serial", n_threads=3)
solve(ks, *problem())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=patience(120), cwd=os.getcwd(), capture_output=True
    )
    assert done.returncode == 0 and not done.stderr
