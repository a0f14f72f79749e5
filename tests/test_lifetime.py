"""Handles, threads, processes and the end of the interpreter (R-70, R-71, R-72, R-75).

Whatever can die or hang does so in a process of its own, with a time limit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flashllm import LLM
from flashllm.conversion.enlarge import inflate
from flashllm.errors import BusyError, FlashError
from flashllm.units import MIB

from . import tiny
from .patience import patience

IDS = [1, 5, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.container(tmp_path_factory.mktemp("lifetime")))


@pytest.fixture(scope="module")
def expected(model):
    with LLM(model, ram_budget="2GiB") as llm:
        return llm.generate(IDS, max_tokens=12, temperature=0, ignore_eos=True).tokens


PRELUDE = """
import json, multiprocessing, os, sys, threading
from flashllm import LLM
from flashllm.errors import FlashError

MODEL, PIN = sys.argv[1], sys.argv[2] == "kept"
ASK = dict(max_tokens=12, temperature=0, ignore_eos=True)

def opened():
    return LLM(MODEL, ram_budget="2GiB", pin=PIN, num_threads=2)

def tokens(llm):
    return llm.generate([1, 5, 9], **ASK).tokens

def in_child(queue):
    with opened() as llm:
        queue.put(tokens(llm))
"""


def child(code: str, model: str, kind: str = "kept") -> subprocess.CompletedProcess:
    # A file, because spawn imports the main module again.
    path = os.path.join(os.path.dirname(model), f"child-{abs(hash(code))}.py")
    with open(path, "w") as file:
        file.write(PRELUDE + code)
    process = subprocess.Popen(
        [sys.executable, path, model, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=patience(60))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # forked children hold the pipes, too
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_four_processes_one_file(model, expected):
    code = PRELUDE + "with opened() as llm: print(json.dumps(tokens(llm)))"
    command = [sys.executable, "-c", code, model, "streamed"]
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(4)
    ]
    for one in children:
        out, _ = one.communicate(timeout=patience(120))
        assert one.returncode == 0 and json.loads(out) == expected


STANDING = """
with LLM(MODEL, ram_budget=int(sys.argv[3]), pin=PIN, storage="direct", num_threads=2) as llm:
    print(json.dumps(tokens(llm)), flush=True)
    sys.stdin.readline()
"""


def test_four_processes_stay_within_four_budgets(tmp_path, rounds):
    """R-70, as the kernel counts what processes share (PSS), with everything loaded."""
    model, budget = tmp_path / "m.flash", rounds(80, 128) * MIB
    inflate(tiny.GOLDEN / "llama-relu", model, size_bytes=rounds(24, 160) * MIB)
    command = [sys.executable, "-c", PRELUDE + STANDING, str(model), "kept", str(budget)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    children = [subprocess.Popen(command, env=env, **pipes) for _ in range(4)]
    answers = {one.stdout.readline() for one in children}
    sizes = [pss(one.pid) for one in children]
    for one in children:
        one.communicate("\n", timeout=patience(120))
        assert one.returncode == 0
    assert len(answers) == 1 and json.loads(answers.pop())
    assert sum(sizes) <= 4 * budget and min(sizes) > budget // 4, sizes


def pss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


@pytest.mark.parametrize("kind", ["kept", "streamed"])
def test_a_forked_child_is_told_and_the_parent_goes_on(model, expected, kind):
    """Threads stay behind in a fork: the child needs a handle of its own, and never hangs."""
    code = """
llm = opened()
before = tokens(llm)
pid = os.fork()
if pid == 0:
    try:
        got = tokens(llm)
        code = 0 if got == before else 1
    except FlashError as error:
        code = 0 if "fork" in str(error) else 2
    llm.close()
    if code == 0:
        with opened() as own:
            code = 0 if tokens(own) == before else 3
    os._exit(code)
_, status = os.waitpid(pid, 0)
assert tokens(llm) == before
llm.close()
print(json.dumps([os.waitstatus_to_exitcode(status), before]))
"""
    done = child(code, model, kind)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, expected]


def test_a_fork_during_a_generation(model, expected):
    code = """
llm = opened()
stream = llm.stream([1, 5, 9], **ASK)
got = list(next(stream).tokens)
pid = os.fork()
if pid == 0:
    try:
        next(stream)
        code = 1
    except FlashError:
        code = 0
    os._exit(code)
_, status = os.waitpid(pid, 0)
for delta in stream:
    got += delta.tokens
print(json.dumps([os.waitstatus_to_exitcode(status), got]))
"""
    done = child(code, model, "streamed")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, expected]


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(model, expected, method):
    code = f"""
if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    with opened() as llm:
        mine = tokens(llm)
        queue = context.Queue()
        process = context.Process(target=in_child, args=(queue,))
        process.start()
        theirs = queue.get(timeout={patience(100)})
        process.join()
    print(json.dumps([process.exitcode, mine, theirs]))
"""
    done = child(code, model, "streamed")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, expected, expected]


def test_eight_threads_on_one_handle_get_an_answer_or_busy(model, expected):
    answers, busy, wrong = [], [], []
    with LLM(model, ram_budget="2GiB", pin=False) as llm:
        start = threading.Barrier(8)

        def ask() -> None:
            start.wait()
            for _ in range(4):
                try:
                    result = llm.generate(IDS, max_tokens=12, temperature=0, ignore_eos=True)
                    (answers if result.tokens == expected else wrong).append(result.tokens)
                except BusyError as error:
                    busy.append(error)

        run_all([threading.Thread(target=ask) for _ in range(8)])
        llm.store.check()
    assert answers and not wrong and len(answers) + len(busy) == 32


def test_eight_handles_on_eight_threads(model, expected):
    answers = []

    def ask() -> None:
        with LLM(model, ram_budget="2GiB", pin=False, io_depth=2, num_threads=1) as llm:
            result = llm.generate(IDS, max_tokens=12, temperature=0, ignore_eos=True)
            answers.append(result.tokens)

    run_all([threading.Thread(target=ask) for _ in range(8)])
    assert answers == [expected] * 8


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=patience(120))
        assert not thread.is_alive()


ENDINGS = {
    "handle never closed": "llm = opened(); print(len(tokens(llm)))",
    "stream dropped half-way": (
        "llm = opened(); s = llm.stream([1, 5, 9], **ASK); next(s); print(12)"
    ),
    "closed under a stream": (
        "llm = opened(); s = llm.stream([1, 5, 9], **ASK); next(s); llm.close()\n"
        "last = list(s)[-1]; assert last.finish_reason == 'cancelled'; print(12)"
    ),
    "daemon thread in a generation": (
        "llm = opened(); seen = threading.Event()\n"
        "def work():\n"
        "    while True:\n"
        "        tokens(llm); seen.set()\n"
        "threading.Thread(target=work, daemon=True).start(); seen.wait(); print(12)"
    ),
    "a callback that raises": (
        "def bad(*a): raise ValueError('mine')\n"
        "try: LLM(MODEL, ram_budget='300MiB', progress=bad)\n"
        "except ValueError: print(12)"
    ),
    "closed twice, at exit too": (
        "import atexit; llm = opened(); atexit.register(llm.close); tokens(llm); llm.close()\n"
        "llm.close(); print(12)"
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_ends_cleanly(model, ending):
    done = child(ENDINGS[ending] + "\nsys.stdout.flush(); sys.exit(7)", model, "streamed")
    assert done.returncode == 7, f"{done.returncode}: {done.stderr}"
    assert done.stdout.strip() == "12" and "Exception ignored" not in done.stderr


def test_a_dropped_stream_frees_the_handle(model, expected):
    with LLM(model, ram_budget="2GiB", pin=False, debug=True) as llm:
        stream = llm.stream(IDS, max_tokens=12, temperature=0, ignore_eos=True)
        next(stream)
        with pytest.raises(FlashError):
            llm.generate(IDS)
        stream.close()
        result = llm.generate(IDS, max_tokens=12, temperature=0, ignore_eos=True)
        assert result.tokens == expected
