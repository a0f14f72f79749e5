"""A conversion that is killed, starved or contradicted: whole or absent, and taken up again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from flashllm import convert
from flashllm.checkpoints import open_checkpoint
from flashllm.container import verify
from flashllm.conversion.inflate import InflatedCheckpoint, Inflation
from flashllm.conversion.planning import plan_conversion
from flashllm.errors import ConversionError, FlashReadError, UnsupportedError
from flashllm.probe.cgroup import MemoryGroup
from flashllm.stress.confine import make_cold

from .patience import patience

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent

# Converts argv[1] into argv[2] and kills itself at progress step argv[3], in the middle of things.
CHILD = """
import os, signal, sys
from flashllm import convert
steps = 0
def progress(done, total, label):
    global steps
    steps += 1
    if steps == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
report = convert(sys.argv[1], sys.argv[2], progress=progress, frame_bytes=2000, codec="zstd")
print(report.n_resumed, steps)
"""

# The same, killed half-way through its argv[3]-th write.
WRITES = """
import os, signal, sys
from flashllm import convert
import flashllm.container.partial as writer
plain, count = writer.write_all, 0
def write_all(fd, offset, data):
    global count
    count += 1
    if count == int(sys.argv[3]):
        plain(fd, offset, data[:len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    plain(fd, offset, data)
writer.write_all = write_all
report = convert(sys.argv[1], sys.argv[2], frame_bytes=2000, codec="zstd")
print(report.n_resumed, count)
"""


def run(script, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience(120),
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "m.flash"
    convert(GOLDEN / "llama-relu", path, frame_bytes=2000, codec="zstd")
    return path.read_bytes()


def check_left_overs(folder: Path, uninterrupted: bytes) -> None:
    """Under the final name: nothing, or the whole file."""
    if (folder / "m.flash").exists():
        assert (folder / "m.flash").read_bytes() == uninterrupted
    known = {"m.flash", "m.flash.partial", "m.flash.partial.journal", "m.flash.partial.journal.new"}
    assert set(os.listdir(folder)) <= known


STEPS = [(CHILD, step) for step in (1, 2, 3, 7, 12, 15)]
STEPS += [(WRITES, step) for step in (1, 2, 3, 7, 11, 12, 13)]


@pytest.mark.parametrize(
    ("script", "step"), STEPS, ids=[f"{'block' if s is CHILD else 'write'} {n}" for s, n in STEPS]
)
def test_a_killed_conversion_is_taken_up(tmp_path, uninterrupted, script, step):
    killed = run(script, GOLDEN / "llama-relu", tmp_path / "m.flash", step)
    check_left_overs(tmp_path, uninterrupted)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    report = convert(GOLDEN / "llama-relu", tmp_path / "m.flash", frame_bytes=2000, codec="zstd")
    assert (tmp_path / "m.flash").read_bytes() == uninterrupted
    assert os.listdir(tmp_path) == ["m.flash"]
    if step >= 7 and script is CHILD:
        assert report.n_resumed > 0


def test_killed_again_and_again(tmp_path, uninterrupted):
    """Every run gets some planes further; the last one finishes the same file."""
    resumed = []
    for step in (4, 8, 12, 10**6):
        done = run(CHILD, GOLDEN / "llama-relu", tmp_path / "m.flash", step)
        check_left_overs(tmp_path, uninterrupted)
        resumed += [int(done.stdout.split()[0])] if done.returncode == 0 else []
    assert resumed and resumed[0] >= 4
    assert (tmp_path / "m.flash").read_bytes() == uninterrupted


def test_other_arguments_start_anew(tmp_path, uninterrupted):
    run(CHILD, GOLDEN / "llama-relu", tmp_path / "m.flash", 12)
    assert (tmp_path / "m.flash.partial").exists()
    report = convert(GOLDEN / "llama-relu", tmp_path / "m.flash", quant="int8")
    assert report.n_resumed == 0 and verify(tmp_path / "m.flash").ok
    assert (tmp_path / "m.flash").read_bytes() != uninterrupted


def test_another_source_starts_anew(tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama-relu", folder)
    run(CHILD, folder, tmp_path / "m.flash", 12)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    report = convert(folder, tmp_path / "m.flash", frame_bytes=2000, codec="zstd")
    assert report.n_resumed == 0


def test_too_little_space_is_known_before_the_start(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    full = type(usage)(usage.total, usage.total - 100_000, 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(ConversionError, match="free"):
        convert(GOLDEN / "llama-relu", tmp_path / "m.flash")
    assert not (tmp_path / "m.flash").exists()


@pytest.mark.parametrize("codec", ["raw", "zstd", "planes"])
def test_the_estimate_is_close_and_not_low(tmp_path, codec):
    with open_checkpoint(GOLDEN / "qwen3") as checkpoint:
        plan = plan_conversion(
            checkpoint,
            quant="keep",
            codec=codec,
            bundle=None,
            frame_bytes=None,
            flash_bytes_per_s=None,
            folder=tmp_path,
        )
    report = convert(GOLDEN / "qwen3", tmp_path / "m.flash", codec=codec)
    assert report.output_bytes <= plan.estimate_bytes <= 1.5 * report.output_bytes


def test_a_cut_source_leaves_nothing_and_is_untouched(tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama-relu", folder)
    size = (folder / "model.safetensors").stat().st_size

    def cut(done, total, label):
        if done:
            os.truncate(folder / "model.safetensors", size // 2)

    with pytest.raises(FlashReadError, match="model.safetensors"):
        convert(folder, tmp_path / "m.flash", progress=cut)
    assert not (tmp_path / "m.flash").exists()


MEMORY = """
import sys
from flashllm import convert
from flashllm.checkpoints import open_checkpoint
from flashllm.conversion.inflate import InflatedCheckpoint, Inflation
source = open_checkpoint(sys.argv[1])
big = InflatedCheckpoint(source, Inflation(channels=64, neurons=64, kv_groups=16))
report = convert(big, sys.argv[2], quant=sys.argv[3])
status = open("/proc/self/status").read()
print(report.output_bytes, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("quant", ["keep", "int8", "int4"])
def test_memory_is_bounded_whatever_the_layer(tmp_path, quant):
    """Layers of 137 MiB in float32; the whole process stays below 128 MiB."""
    done = run(MEMORY, GOLDEN / "llama-ungated-relu2", tmp_path / "m.flash", quant)
    assert done.returncode == 0, done.stderr
    n_bytes, peak = map(int, done.stdout.split())
    assert peak < 128 * 2**20, f"{peak / 2**20:.0f} MiB for {n_bytes / 2**20:.0f} MiB"


def write_checkpoint(folder: Path, inflation: Inflation) -> Path:
    """The inflated golden model as a file, as a checkpoint would be."""
    folder.mkdir()
    with open_checkpoint(GOLDEN / "llama-ungated-relu2") as source:
        big = InflatedCheckpoint(source, inflation)
        save_file(
            {name: big.rows(name, 0, big.shape(name)[0]) for name in big.names()},
            folder / "model.safetensors",
        )
        config = dict(source.config, **_sizes(big.inflated_config))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


THROUGH_SCRATCH = MEMORY.replace(
    "big = InflatedCheckpoint(source, Inflation(channels=64, neurons=64, kv_groups=16))",
    "import flashllm.conversion.source as s; s.COLUMNS_IN_MEMORY_BYTES = 0; big = source",
)
assert THROUGH_SCRATCH != MEMORY


def test_memory_through_scratch_files(tmp_path):
    """The same from a file, whose down projections must be transposed."""
    folder = write_checkpoint(tmp_path / "big", Inflation(channels=48, neurons=48))
    done = run(THROUGH_SCRATCH, folder, tmp_path / "m.flash", "keep")
    assert done.returncode == 0, done.stderr
    n_bytes, peak = map(int, done.stdout.split())
    assert peak < 128 * 2**20, f"{peak / 2**20:.0f} MiB for {n_bytes / 2**20:.0f} MiB"


@pytest.mark.cgroup
def test_a_memory_group_is_not_filled_with_the_input(tmp_path):
    """Pages that were read or written are dropped: the kernel's charge stays below the file."""
    folder = write_checkpoint(tmp_path / "big", Inflation(channels=80, neurons=96, kv_groups=2))
    size = (folder / "model.safetensors").stat().st_size
    limit = 176 * 2**20
    assert size > limit
    try:
        group = MemoryGroup(limit, name="flashllm-convert")
    except UnsupportedError as error:
        pytest.skip(str(error))
    make_cold(folder / "model.safetensors")
    with group:
        child = group.popen(
            [sys.executable, "-c", THROUGH_SCRATCH, folder, tmp_path / "m.flash", "keep"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        assert child.wait(timeout=patience(120)) == 0
        charges = group.charges()
    assert charges.failcnt == 0 and charges.oom_kills == 0
    assert charges.peak_bytes < limit


def _sizes(config) -> dict:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
    }
