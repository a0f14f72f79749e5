"""The governor: its decisions, tokens that do not notice, a neighbour that wants memory (R-06)."""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flashllm import LLM
from flashllm.assembly import open_floor
from flashllm.conversion.enlarge import inflate
from flashllm.errors import FlashReadError, UnsupportedError
from flashllm.governor import GROWTH, MOST_PATIENCE_S, PATIENCE_S, Course, Governor
from flashllm.probe import pressure
from flashllm.probe.cgroup import MemoryGroup
from flashllm.probe.pressure import MemoryPressure, Sample
from flashllm.stress.confine import make_cold
from flashllm.units import MIB

from .capped import needs_cgroup
from .patience import patience
from .test_probe_memory import Tree
from .tiny import GOLDEN

IDS = [3, 17, 40, 8, 8, 22, 61, 5]
ASK = {"temperature": 2.0, "seed": 5, "ignore_eos": True}
QUIET, PRESSED = Sample(0.0, 1.0), Sample(0.3, 0.25)


@dataclass
class Fake:
    """A source that tells what is put into it; `served` counts what was taken."""

    samples: queue.Queue = field(default_factory=queue.Queue)
    asked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    closed: bool = False

    def tell(self, sample: Sample, times: int = 1) -> None:
        """Return when the governor has dealt with it: it asks again."""
        for _ in range(times):
            self.samples.put(sample)
            assert self.asked.acquire(timeout=patience(120))

    def wait(self, seconds: float) -> Sample:
        self.asked.release()
        return self.samples.get()

    def wake(self) -> None:
        self.samples.put(QUIET)

    def close(self) -> None:
        self.closed = True


def plenty() -> int:
    return 2**40


def test_down_by_halves_to_the_floor():
    course = Course(100, 900, 900)
    budgets = [course.after(PRESSED, plenty) for _ in range(12)]
    assert budgets[:3] == [500, 300, 200] and budgets[-1] == 100


def test_up_slowly_only_when_quiet_and_only_into_free_memory():
    course = Course(100, 900, 100)
    seconds = int(PATIENCE_S)
    assert [course.after(QUIET, plenty) for _ in range(seconds)][-2:] == [100, 200]
    course.after(PRESSED, plenty)
    assert course.budget == 150 and course.patience_s == 2 * PATIENCE_S
    assert [course.after(QUIET, plenty) for _ in range(2 * seconds)][-2:] == [150, 250]
    assert [course.after(QUIET, lambda: 60) for _ in range(seconds)][-1] == 280
    for _ in range(200):
        course.after(QUIET, plenty)
    assert course.budget == 900


def test_a_shrink_gets_time_to_show_its_effect():
    course, event = Course(100, 900, 900), Sample(1.0, 0.01)
    assert [course.after(event, plenty) for _ in range(20)] == [500] * 20
    assert [course.after(event, plenty) for _ in range(10)][-1] == 300


def test_a_few_stalls_are_no_pressure():
    course = Course(100, 900, 900)
    assert course.after(Sample(0.05, 0.25), plenty) == 900


def test_patience_ends_somewhere():
    course = Course(100, 900, 900)
    for _ in range(20):
        course.budget = 900
        course.after(PRESSED, plenty)
    assert course.patience_s == MOST_PATIENCE_S


def test_growth_that_cannot_be_read_is_told_and_tried_again():
    source, budgets = Fake(), []

    def resize(budget: int) -> None:
        if budget > 500 and not budgets[1:]:
            budgets.append("failed")
            raise FlashReadError(5, "no", "m.flash", 0)
        budgets.append(budget)

    governor = Governor(lambda: resize, floor=100, most=900, free_bytes=plenty, source=source)
    source.asked.acquire()
    source.tell(PRESSED)
    source.tell(QUIET, times=2 * int(PATIENCE_S))
    assert budgets == [500, "failed"] and "m.flash" in governor.figures()["error"]
    source.tell(QUIET, times=2 * int(PATIENCE_S))
    assert budgets[2] == 500 + 800 // GROWTH
    governor.close()
    governor.thread.join(patience(10))
    assert source.closed and not governor.thread.is_alive()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("governor") / "m.flash"
    inflate(GOLDEN / "llama-relu", path, size_bytes=24 * MIB)
    return str(path)


def test_tokens_do_not_notice(model):
    with LLM(model, ram_budget="1GiB") as llm:
        expected = llm.generate(IDS, max_tokens=12, **ASK).tokens
    source = Fake()
    with LLM(model, ram_budget="1GiB", governor=source, debug=True) as llm:
        source.asked.acquire()
        floor, budgets, tokens = open_floor(llm.plan), [llm.ram_budget], []
        for i, delta in enumerate(llm.stream(IDS, max_tokens=12, **ASK)):
            tokens += delta.tokens
            # A generator holds no turn between tokens: the governor resizes at once.
            source.tell(PRESSED if i < 6 else QUIET, times=3 if i < 6 else 200)
            budgets.append(llm.ram_budget)
        assert tokens == expected
        assert budgets[1] - floor == (2**30 - floor) // 8 and budgets[6] - floor < 2 * MIB
        assert budgets[-1] > budgets[6] and llm.live()["governor"]["shrinks"] > 5
        llm.resize(floor + MIB)
        source.tell(QUIET, times=200)
        assert llm.ram_budget == floor + MIB  # never more than the user gave


def test_a_dropped_handle_is_not_kept_alive(model):
    source = Fake()
    llm = LLM(model, ram_budget="1GiB", governor=source)
    thread, gone = llm._governor.thread, weakref.ref(llm)
    llm.close()
    thread.join(patience(10))
    assert source.closed and not thread.is_alive()
    other = LLM(model, ram_budget="1GiB", governor=Fake())
    thread, gone = other._governor.thread, weakref.ref(other)
    del other
    gc.collect()
    thread.join(patience(10))
    assert gone() is None and not thread.is_alive()


def test_off_unless_asked_for(model, monkeypatch):
    with LLM(model, ram_budget="1GiB") as llm:
        assert llm._governor is None and "governor" not in llm.live()
    monkeypatch.setenv("FLASHLLM_GOVERNOR", "1")
    monkeypatch.setattr("flashllm.governor.MemoryPressure", Fake)
    with LLM(model, ram_budget="1GiB") as llm:
        assert llm._governor is not None


# ------------------------------------------------------------------------------- where it is heard


def test_stall_times_are_a_share_of_the_time(tmp_path, monkeypatch):
    tree = Tree(tmp_path)
    tree.mount(2, "cg")
    tree.member("0::/app")
    line = "some avg10=0.00 avg60=0.00 avg300=0.00 total={}\nfull avg10=0 total=0\n"
    tree.write("proc/pressure/memory", line.format(1000))
    tree.write("cg/app/memory.pressure", line.format(5000))
    now = [100.0]
    monkeypatch.setattr(pressure.time, "monotonic", lambda: now[0])
    heard = MemoryPressure(tree.proc)
    assert [source.rpartition("/")[2] for source in heard.sources] == ["memory", "memory.pressure"]
    now[0] += 2.0
    tree.write("cg/app/memory.pressure", line.format(5000 + 500_000))
    assert heard.wait(0) == Sample(0.25, 2.0)
    now[0] += 1.0
    assert heard.wait(0) == Sample(0.0, 1.0)
    heard.wake()
    heard.wait(30)  # returns at once
    heard.close()


def test_a_kernel_that_tells_nothing(tmp_path):
    with pytest.raises(UnsupportedError, match="PSI"):
        MemoryPressure(tmp_path)


# ----------------------------------------------------------------------------------- a neighbour

ENGINE = """
import json, signal, sys, threading
from flashllm import LLM
from flashllm.probe.pressure import MemoryPressure

begin = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: begin.set())

class Later(MemoryPressure):
    def wait(self, seconds):
        begin.wait()
        return super().wait(seconds)

ask = dict(max_tokens=4, temperature=2.0, seed=5, ignore_eos=True)
with LLM(sys.argv[1], ram_budget=int(sys.argv[2]), storage="direct", governor=Later()) as llm:
    before = last = llm.ram_budget
    expected = llm.generate([3, 17, 40, 8], **ask).tokens
    print("ready", flush=True)
    for line in sys.stdin:  # one request for each line
        same = llm.generate([3, 17, 40, 8], **ask).tokens == expected
        print(json.dumps([llm.ram_budget, same]), flush=True)
"""
NEIGHBOUR = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    print("ready", flush=True)
    while True:
        for at in range(0, len(pages), 4096):
            pages[at]
"""


@needs_cgroup
@pytest.mark.cgroup
def test_a_neighbour_gets_the_memory_it_needs(tmp_path):
    """R-06: both in one group that is too small for both; stall times fall after we gave way."""
    if not os.access("/proc/pressure/memory", os.R_OK):
        pytest.skip("no stall times (PSI) in this kernel")
    model, file = tmp_path / "m.flash", tmp_path / "pages"
    inflate(GOLDEN / "llama-relu", model, size_bytes=96 * MIB)
    with open(file, "wb") as out:  # really there: holes would cost no reads
        for _ in range(100):
            out.write(b"x" * MIB)
    make_cold(file)
    budget = 136 * MIB
    with MemoryGroup(150 * MIB, name="flashllm-test-neighbour") as group:
        command = [sys.executable, "-c", ENGINE, str(model), str(budget)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        engine = group.popen(command, **pipes)
        assert engine.stdout.readline() == "ready\n"
        # Two of them: the kernel weighs a processor's stalls by how busy others keep the other one.
        neighbours = [
            group.popen([sys.executable, "-c", NEIGHBOUR, str(file)], **pipes) for _ in range(2)
        ]
        for neighbour in neighbours:
            assert neighbour.stdout.readline() == "ready\n"
        assert first_share(lambda share: share > 0.2) > 0.2, "there was no pressure to react to"
        assert ask(engine) == [budget, True]
        engine.send_signal(signal.SIGUSR1)
        assert first_share(lambda share: share < 0.1) < 0.1
        given, same = ask(engine)
        assert given < budget and same
        engine.stdin.close()
        assert engine.wait(patience(60)) == 0 and group.charges().oom_kills == 0
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
        for child in (engine, *neighbours):
            child.stdout.close()
            child.stdin.close()


def ask(engine) -> list:
    print(file=engine.stdin, flush=True)
    return json.loads(engine.stdout.readline())


def first_share(wanted) -> float:
    """The first share of 0.3 s of stalls that is as wanted; the last one seen after 20 s."""
    for _ in range(70):
        before = pressure._stalled_us(Path("/proc/pressure/memory"))
        time.sleep(0.3)
        share = (pressure._stalled_us(Path("/proc/pressure/memory")) - before) / 0.3e6
        if wanted(share):
            break
    return share
