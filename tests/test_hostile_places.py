"""Places and circumstances that nobody would choose: how a process was started, what it may still
have, what becomes of its file, and who sends it signals.  A typed error or the same tokens, never a
traceback and never a signal's death.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashllm import LLM, convert
from flashllm.cli.streams import read_text
from flashllm.conversion.enlarge import inflate
from flashllm.errors import (
    BudgetError,
    BusyError,
    ChecksumError,
    ContextLengthError,
    ConversionError,
    FlashReadError,
    FormatError,
    UsageError,
)
from flashllm.probe.cgroup import MemoryGroup
from flashllm.probe.process import process_memory
from flashllm.units import MIB

from . import tiny
from .capped import needs_cgroup
from .patience import patience

ASK = {"max_tokens": 6, "temperature": 2.0, "seed": 1, "ignore_eos": True}
ENVIRON = {**os.environ, "PYTHONPATH": ":".join(sys.path)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.container(tmp_path_factory.mktemp("places")))


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    path = tmp_path_factory.mktemp("streamed") / "m.flash"
    inflate(tiny.GOLDEN / "llama-relu", path, size_bytes=2 * MIB, min_layers=2)
    return path


def opened(path, **engine) -> LLM:
    return LLM(str(path), **{"ram_budget": "2GiB", "pin": False, "num_threads": 2, **engine})


def tokens(llm: LLM, **changed) -> list[int]:
    return llm.generate([1, 2, 3], **{**ASK, **changed}).tokens


# ---------------------------------------------------------------------------- standard streams


def shell(line: str, model: str) -> subprocess.CompletedProcess:
    """`line` in bash; $G is a generation on the command line."""
    command = (f"{sys.executable} -m flashllm generate {model} -n 8 --temperature 5 --seed 3 "
               "--ignore-eos --ram-budget 300MiB")  # fmt: skip
    return subprocess.run(
        ["bash", "-c", "set -o pipefail; " + line], capture_output=True, timeout=patience(120),
        env={**ENVIRON, "G": command},
    )  # fmt: skip


# line -> exit code, what stderr says
STREAMS = {
    "$G -p hello --json >&-": (0, "total"),
    "$G -p hello 2>&- | grep -v -q total": (0, ""),
    "$G -p - <&-": (2, "the prompt is empty"),
    "printf 'a\\377b' | $G -p -": (2, "stdin: not UTF-8"),
    "PYTHONIOENCODING=ascii $G -p hello": (0, "tok/s"),
    "$G -p hello >/dev/full": (1, "No space left"),
}


@pytest.mark.parametrize("line", STREAMS)
def test_streams_as_they_were_left_to_us(model, line):
    code, said = STREAMS[line]
    done = shell(line, model)
    assert done.returncode == code, done.stderr
    assert said.encode() in done.stderr and b"Traceback" not in done.stderr, done.stderr


def test_a_text_that_is_none(streamed):
    with pytest.raises(UsageError, match=r"m.flash: not UTF-8: .* at byte \d+"):
        read_text(str(streamed))


# --------------------------------------------------------------------------- little of everything


@pytest.mark.kernel
def test_without_proc(model):
    """The floor still counts the process, by the peak that the kernel tells without /proc."""
    hidden = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*hidden, "true"]).returncode:
        pytest.skip("no mount namespace may be made here")
    command = [*hidden, sys.executable, "-m", "flashllm", "generate", model, "--token-ids", "1,2",
               "-n", "2", "--ram-budget"]  # fmt: skip
    refused = subprocess.run([*command, "1MiB"], capture_output=True, text=True, env=ENVIRON)
    assert refused.returncode == 4, refused.stderr
    floor = int(refused.stderr.partition("floor of ")[2].split()[0])
    assert floor > 30 * MIB
    runs = subprocess.run([*command, str(floor + MIB)], capture_output=True, env=ENVIRON)
    assert runs.returncode == 0, runs.stderr


PIDS = Path("/sys/fs/cgroup/pids")


# most threads and processes -> exit code, what stderr says
THREADS = {1: (1, "cannot start"), 3: (1, "temporarily unavailable"), 8: (0, "tok")}


@pytest.mark.cgroup
@pytest.mark.parametrize("most", THREADS)
def test_hardly_any_threads(model, most):
    """Fewer decoding and reading threads, or an error that says so; a result is never lost to a
    probe that wants a thread of its own."""
    group = PIDS / f"flashllm-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "pids.max").write_text(str(most))
    except OSError as error:
        pytest.skip(f"no pids control group: {error}")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flashllm", "generate", model, "--token-ids", "1,2", "-n", "2",
             "--no-pin", "--num-threads", "2", "--ignore-eos"],
            capture_output=True, text=True, env={**ENVIRON, "OPENBLAS_NUM_THREADS": "1"},
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )  # fmt: skip
    finally:
        group.rmdir()
    code, said = THREADS[most]
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert said in done.stderr, done.stderr


def test_no_descriptors_left(streamed):
    taken = []
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with opened(streamed) as llm:
        expected = tokens(llm)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[0]), before[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            assert tokens(llm) == expected
            llm.resize(3 * 2**30)
            assert llm.live()["rss"] > 0
            with pytest.raises(FlashReadError, match="Too many open files"):
                opened(streamed)
        finally:
            for fd in taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        with opened(streamed) as other:
            assert tokens(other) == expected == tokens(llm)


def test_files_may_not_grow(tmp_path):
    """RLIMIT_FSIZE, which is a quota of a process: SIGXFSZ must not end it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))
    try:
        with pytest.raises(ConversionError, match="File too large"):
            convert(tiny.GOLDEN / "llama-relu", tmp_path / "m.flash")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "m.flash").exists()
    convert(tiny.GOLDEN / "llama-relu", tmp_path / "m.flash")


def test_a_context_full_at_the_floor(streamed):
    """Every token that the context holds, with a budget of the floor; one more is refused."""
    with pytest.raises(BudgetError) as refused:
        opened(streamed, ram_budget=1)
    floor = refused.value.floor_bytes + 8 * MIB  # the test runner's own heap moves by as much
    with opened(streamed, ram_budget=floor) as llm:
        n = llm.n_context
        result = llm.generate([1 + i % 60 for i in range(n - 2)], max_tokens=2, ignore_eos=True)
        assert len(result.tokens) == 2 and llm.live()["rss"] <= floor
        for n_tokens in (n + 1, 10**6):
            with pytest.raises(ContextLengthError):
                llm.generate([5] * n_tokens, max_tokens=1)


# ------------------------------------------------------------------------- what becomes of the file


def test_linked_renamed_and_moved_in_use(streamed, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    path = folder / "m.flash"
    shutil.copy(streamed, path)
    with opened(path) as llm:
        expected = tokens(llm)
        os.link(path, folder / "linked.flash")
        os.rename(path, folder / "renamed.flash")
        os.rename(folder, tmp_path / "there")
        assert tokens(llm) == expected
        with pytest.raises(FlashReadError, match="No such file"):
            opened(path)
        with opened(tmp_path / "there/linked.flash") as other:
            assert tokens(other) == expected


def test_a_file_that_grows_in_use(streamed, tmp_path):
    path = tmp_path / "m.flash"
    shutil.copy(streamed, path)
    os.chmod(path, 0o600)
    with opened(path) as llm:
        expected = tokens(llm)
        with open(path, "ab") as file:
            file.write(b"x" * 5000)
        assert tokens(llm) == expected
        with pytest.raises(FormatError, match="file size"):
            opened(path)


@pytest.mark.parametrize("storage", ["direct", "pread", "mmap"])
def test_a_hole_under_an_open_engine(streamed, tmp_path, storage):
    """Blocks given back to the file system: zeros come, and are refused."""
    path = tmp_path / "m.flash"
    shutil.copy(streamed, path)
    os.chmod(path, 0o600)
    with opened(path, storage=storage) as llm:
        expected = tokens(llm)
        start = int(llm.container.planes["layers.1.deciding"].offsets[0]) // 4096 * 4096
        with open(path, "r+b") as file:
            kept = os.pread(file.fileno(), 65536, start)
            punch = ctypes.CDLL(None, use_errno=True).fallocate
            punch.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
            if punch(file.fileno(), 3, start, len(kept)):  # PUNCH_HOLE | KEEP_SIZE
                pytest.skip(f"no holes here: {os.strerror(ctypes.get_errno())}")
            with pytest.raises(ChecksumError, match="layers.1.deciding"):
                tokens(llm)
            os.pwrite(file.fileno(), kept, start)
        assert tokens(llm) == expected


# ----------------------------------------------------------------------------- signals, neighbours


def on_alarm(handler, seconds: float, again: float = 0.0):
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, again)

    def end() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    return end


def test_a_storm_of_signals(streamed):
    with opened(streamed) as llm:
        expected, heard = tokens(llm), []
        end = on_alarm(lambda *a: heard.append(1), 0.001, 0.001)
        try:
            while len(heard) < 20:
                assert tokens(llm) == expected
        finally:
            end()


def test_a_handler_that_asks_for_tokens_itself(streamed):
    with opened(streamed) as llm:
        expected, told = tokens(llm), []

        def handler(*args) -> None:
            try:
                told.append(tokens(llm))
            except BusyError as error:
                told.append(error)

        end = on_alarm(handler, 0.001, 0.002)
        try:
            while not any(isinstance(answer, BusyError) for answer in told):
                assert tokens(llm) == expected
        finally:
            end()
        assert all(isinstance(answer, BusyError) or answer == expected for answer in told)


LOWERED = """
import sys
from flashllm import LLM
with LLM(sys.argv[1], ram_budget=int(sys.argv[2]), storage="direct") as llm:
    ask = dict(temperature=0, ignore_eos=True)
    print(llm.generate([1, 2, 3], max_tokens=8, **ask).tokens, flush=True)
    sys.stdin.readline()
    print(llm.generate([1, 2, 3], max_tokens=8, **ask).tokens, flush=True)
    print(llm.generate([1, 2, 3] * 8, max_tokens=8, **ask).finish_reason, flush=True)
"""


@needs_cgroup
@pytest.mark.cgroup
def test_somebody_lowers_the_limit_as_far_as_the_kernel_lets(streamed):
    """Not told of it, the engine goes on: what it will need it has touched already."""
    budget = 128 * MIB
    with MemoryGroup(budget, name="flashllm-test") as group:
        child = group.popen(
            [sys.executable, "-c", LOWERED, str(streamed), str(budget)], env=ENVIRON, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        before = child.stdout.readline()
        limit = budget
        while limit > MIB:
            try:
                group.set_limit(limit - MIB)
            except OSError:
                break
            limit -= MIB
        group.set_limit(limit + 16 * MIB)  # for libraries' pages, which were dropped on the way
        out, err = child.communicate("\n", timeout=patience(120))
        assert child.returncode == 0, (child.returncode, limit, err)
        assert out.splitlines() == [before.strip(), "length"]
        assert group.charges().oom_kills == 0 and limit + 16 * MIB < budget


def test_memory_without_proc(tmp_path):
    found, true = process_memory(tmp_path), process_memory()
    assert found.rss == found.peak_rss >= true.rss
