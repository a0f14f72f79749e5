"""Slow disks, bit rot, power cuts, disks that refuse (R-56, R-58 to R-61).

On a loop device of ours; needs root.  What needs strace or another user says so when it skips.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashllm import LLM, convert
from flashllm.container import verify
from flashllm.conversion.enlarge import inflate
from flashllm.errors import ChecksumError
from flashllm.stress.confine import make_cold
from flashllm.units import MIB

from .loop_disk import loop_disk
from .patience import patience
from .test_injected import STRACE
from .test_injected import why_not as why_no_strace
from .tiny import GOLDEN

pytestmark = pytest.mark.kernel
ASK = {"max_tokens": 4, "temperature": 2.0, "seed": 1, "ignore_eos": True}
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    with loop_disk(tmp_path_factory.mktemp("disk")) as mounted:
        yield mounted


# ------------------------------------------------------------------------------------- bit rot


@pytest.mark.parametrize("storage", ["direct", "pread", "mmap"])
def test_a_bit_that_flips_under_an_open_model(disk, storage):
    """R-61: the next read of that frame notices, the others go on, `verify` lists it alone."""
    path = disk.folder / "m.flash"
    inflate(GOLDEN / "llama-relu", path, size_bytes=2 * MIB, min_layers=2, overwrite=True)
    os.sync()
    with LLM(str(path), ram_budget="1GiB", storage=storage, pin=False) as llm:
        expected = llm.generate([1, 2, 3], **ASK).tokens
        plane = llm.container.planes["layers.1.deciding"]
        offset = int(plane.offsets[0]) + 100
        make_cold(path)
        disk.flip(path, offset)
        with pytest.raises(ChecksumError, match="plane layers.1.deciding, frame 0"):
            llm.generate([1, 2, 3], **ASK)
        make_cold(path)
        seen = verify(path)
        assert [damage.where for damage in seen.damage] == ["plane layers.1.deciding frame 0"]
        disk.flip(path, offset)
        make_cold(path)
        assert llm.generate([1, 2, 3], **ASK).tokens == expected
        assert verify(path).ok


# ------------------------------------------------------------------------------------ slow disks

BLKIO = Path("/sys/fs/cgroup/blkio")
MB = 10**6


@pytest.mark.long
@pytest.mark.parametrize(
    "kind, limit", [("bps", n * MB) for n in (10, 50, 200)] + [("iops", n) for n in (100, 1000)]
)
def test_a_slow_disk_sets_the_pace(disk, kind, limit):
    """R-56: the same tokens, at the speed that the disk's rate and the bytes of a token give."""
    if not (BLKIO / "cgroup.procs").exists():
        pytest.skip("no blkio control groups (version 1)")
    path = disk.folder / "slow.flash"
    inflate(GOLDEN / "llama-mha", path, size_bytes=8 * MIB, quant="bf16", overwrite=True)
    os.sync()
    # Throttling lets the first tenth of a second pass: long enough that it does not matter.
    n_tokens = max(8, 2 * limit // (8 * MIB)) if kind == "bps" else 8
    group = BLKIO / f"flashllm-test-{os.getpid()}"
    group.mkdir()
    try:
        throttle = group / f"blkio.throttle.read_{kind}_device"
        throttle.write_text(f"{disk.device()} {limit}")
        command = [
            sys.executable, "-m", "flashllm", "generate", str(path), "--json", "--no-pin",
            "--storage", "direct", "--ram-budget", "1GiB", "--token-ids", "1,2,3",
            "--max-tokens", str(n_tokens), "--ignore-eos", "--temperature", "0",
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=patience(200),
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
            env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        )  # fmt: skip
    finally:
        group.rmdir()
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    with LLM(str(path), ram_budget="1GiB") as llm:
        same = llm.generate([1, 2, 3], max_tokens=n_tokens, temperature=0, ignore_eos=True)
        assert told["tokens"] == same.tokens
    if kind == "bps":  # the ring reads ahead for one token more
        per_token = told["flash"]["bytes_read"] / (n_tokens + 1)
        pace = told["timings"]["predicted_per_second"] * per_token / limit
        # Never faster; slower only where others want the processors as well.
        assert 0.75 / patience(1.0) < pace < 1.25


# ------------------------------------------------------------------------------------ power cuts

# Converts again and again over the same name, two contents in turn.
CONVERTING = """
import sys
from flashllm import convert
while True:
    for quant in ("int8", "f32"):
        convert(sys.argv[1], sys.argv[2], quant=quant, overwrite=True)
        print(quant, flush=True)
"""


def converting(folder: Path) -> subprocess.Popen:
    child = subprocess.Popen(
        [sys.executable, "-c", CONVERTING, str(GOLDEN / "llama-relu"), str(folder / "m.flash")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert child.stdout.readline() and child.stdout.readline()  # one of each is there
    return child


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Digests of the two contents."""
    path = tmp_path_factory.mktemp("whole") / "m.flash"
    digests = set()
    for quant in ("int8", "f32"):
        convert(GOLDEN / "llama-relu", path, quant=quant, overwrite=True)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    return digests


def check_survivor(folder: Path, whole: set[str]) -> None:
    """The final name holds one of the two contents; beside it lies only what is known to."""
    assert hashlib.sha256((folder / "m.flash").read_bytes()).hexdigest() in whole
    known = {"m.flash", "m.flash.partial", "m.flash.partial.journal", "m.flash.partial.journal.new"}
    assert set(os.listdir(folder)) - {"lost+found"} <= known


def test_power_cuts_by_copies_of_the_device(tmp_path, whole, rounds):
    """What the device holds at some instant, when everything in memory is lost."""
    rng, n_cuts = random.Random(5), rounds(5, 20)
    with loop_disk(tmp_path) as disk:
        child = converting(disk.folder)
        try:
            for number in range(n_cuts):
                time.sleep(rng.uniform(0, 0.2))
                child.send_signal(signal.SIGSTOP)  # a copy takes longer than an instant
                shutil.copyfile(disk.image, tmp_path / f"copy-{number}")
                child.send_signal(signal.SIGCONT)
        finally:
            end(child)
        for number in range(n_cuts):
            disk.unmount()
            os.replace(tmp_path / f"copy-{number}", disk.image)
            disk.mount()  # which replays the journal
            check_survivor(disk.folder, whole)


def test_power_cuts_by_shutting_the_file_system_down(tmp_path, whole, rounds):
    rng = random.Random(6)
    with loop_disk(tmp_path) as disk:
        for _ in range(rounds(1, 20)):
            child = converting(disk.folder)
            try:
                time.sleep(rng.uniform(0, 0.2))
                disk.pull_the_plug()
                assert child.wait(patience(30)) == 1  # a typed error, not a signal
            finally:
                end(child)
            disk.unmount()
            disk.mount()
            check_survivor(disk.folder, whole)


def test_without_a_sync_the_cut_would_be_seen(tmp_path):
    """The method can fail: a file renamed without being forced out comes back empty or not."""
    with loop_disk(tmp_path) as disk:
        path = disk.folder / "m.flash"
        path.with_suffix(".new").write_bytes(b"x" * 100_000)
        os.replace(path.with_suffix(".new"), path)
        disk.pull_the_plug()
        disk.unmount()
        disk.mount()
        assert not path.exists() or path.stat().st_size == 0


def end(child: subprocess.Popen) -> None:
    child.kill()
    child.wait()
    child.stdout.close()


# ---------------------------------------------------------------------------- disks that refuse


def run_convert(out: Path, *before: str, **popen) -> subprocess.CompletedProcess:
    command = [*before, sys.executable, "-m", "flashllm", "convert", str(GOLDEN / "llama-relu"),
               str(out)]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, timeout=patience(120),
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, **popen,
    )  # fmt: skip


SYSCALLS = {
    "fsync": "fsync:error=EIO:when={}",
    "write": "pwrite64:error=ENOSPC:when={}",
    "quota": "pwrite64:error=EDQUOT:when={}",
}


@pytest.mark.parametrize(
    "call_name, n",
    [("fsync", 1), ("write", 7), ("quota", 3)]
    + [pytest.param("fsync", 2, marks=pytest.mark.long)]
    + [pytest.param("write", n, marks=pytest.mark.long) for n in range(1, 7)],
)
def test_calls_that_the_kernel_fails(tmp_path, call_name, n):
    """R-59: the n-th fsync is an error of the device, the n-th write finds it full, or the
    user's quota used up."""
    reason = why_no_strace()
    if reason is not None:
        pytest.skip(reason)
    inject = SYSCALLS[call_name].format(f"{n}+")
    done = run_convert(tmp_path / "m.flash", STRACE, "-f", "-qq", "-o", "/dev/null", "-e",
                       f"inject={inject}")  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "flashllm: " in done.stderr and not (tmp_path / "m.flash").exists()


def test_a_full_disk_is_known_at_the_start(disk):
    filler = disk.folder / "filler"
    with open(filler, "wb") as file:
        while True:
            try:
                os.write(file.fileno(), bytes(65536))
            except OSError:
                break
    try:
        done = run_convert(disk.folder / "full.flash")
        assert done.returncode == 1 and "free" in done.stderr, done.stderr
        assert not (disk.folder / "full.flash").exists()
    finally:
        filler.unlink()


def test_a_read_only_disk_and_a_folder_of_others(tmp_path):
    """R-60: root may write anywhere, so the second is asked without that right."""
    with loop_disk(tmp_path) as disk:
        disk.unmount()
        disk.mount("ro")
        done = run_convert(disk.folder / "m.flash")
        assert done.returncode == 1 and "Read-only" in done.stderr, done.stderr
        disk.unmount()
        disk.mount()
        os.chmod(disk.folder, 0o555)
        done = run_convert(disk.folder / "m.flash", preexec_fn=obey_permissions)
        assert done.returncode == 1 and "Permission denied" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and str(disk.folder) in done.stderr


def obey_permissions() -> None:
    """Before exec: root without the right to override them."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
