"""resize: the same tokens whatever happens between them, memory given back, the floor refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from flashllm import LLM
from flashllm.conversion.enlarge import inflate
from flashllm.errors import BudgetError, ClosedError, FlashReadError, UsageError
from flashllm.planning import LABELS
from flashllm.probe.process import process_memory
from flashllm.units import MIB

from .capped import needs_cgroup
from .offload_model import Model, run_step
from .patience import patience
from .tiny import GOLDEN

IDS = [3, 17, 40, 8, 8, 22, 61, 5]
N = 8
SAMPLING = {"temperature": 2.0, "seed": 5, "ignore_eos": True}  # greedy text soon repeats itself


@pytest.fixture(scope="module", params=["sparse raw", "dense zstd"])
def model(request, tmp_path_factory):
    kind, codec = request.param.split()
    source = {"sparse": "llama-relu", "dense": "llama-mha"}[kind]
    path = tmp_path_factory.mktemp("resize") / f"{kind}.flash"
    quant = "int8" if codec == "raw" else "bf16"
    inflate(GOLDEN / source, path, size_bytes=24 * MIB, quant=quant, codec=codec)
    return str(path)


@pytest.fixture(scope="module")
def expected(model):
    with LLM(model, ram_budget="1GiB") as llm:
        return llm.generate(IDS, max_tokens=N, **SAMPLING).tokens


def floor_of(llm) -> int:
    with pytest.raises(BudgetError) as refused:
        llm.resize(1)
    return refused.value.floor_bytes


def test_between_generations_down_to_the_floor_and_up_again(model, expected):
    with LLM(model, ram_budget="1GiB", debug=True) as llm:
        opened, floor = llm.plan, floor_of(llm)
        whole = sum(opened.ledger.lines()[label] for label in LABELS.values()
                    if label in opened.ledger.lines())  # fmt: skip
        for share in (1.0, 0.5, 0.0, 0.3, 1.0):
            llm.resize(floor + int(share * 1.1 * whole))
            llm.plan.ledger.check()
            assert llm.ram_budget == floor + int(share * 1.1 * whole)
            got = llm.generate(IDS, max_tokens=N, **SAMPLING)
            assert got.tokens == expected, share
            assert (got.flash["bytes_read"] > 4 * MIB) == (llm.plan.streamed_bytes > 0)
        assert llm.plan.resident == opened.resident


@pytest.mark.parametrize("storage", ["direct", "pread", "mmap"])
def test_between_tokens_of_a_stream(model, expected, storage):
    with LLM(model, ram_budget="1GiB", storage=storage, debug=True) as llm:
        floor = floor_of(llm)
        budgets = [floor, floor + 12 * MIB, 2**30, floor + 5 * MIB]
        tokens = []
        for i, delta in enumerate(llm.stream(IDS, max_tokens=N, **SAMPLING)):
            tokens += delta.tokens
            llm.resize(budgets[i % len(budgets)])
        assert tokens == expected


def test_from_another_thread_while_tokens_are_made(model, expected):
    with LLM(model, ram_budget="1GiB", debug=True) as llm:
        floor, results = floor_of(llm), []

        def generate():
            results.append(llm.generate(IDS, max_tokens=2 * N, **SAMPLING))

        thread = threading.Thread(target=generate)
        thread.start()
        n = 0
        while thread.is_alive():
            llm.resize(floor + n % 4 * 5 * MIB)
            n += 1
        assert n > 1 and results[0].tokens[:N] == expected


def test_below_the_floor_nothing_changes(model, expected):
    with LLM(model, ram_budget="1GiB") as llm:
        floor, before = floor_of(llm), llm.plan
        with pytest.raises(BudgetError, match=f"floor of {floor} bytes"):
            llm.resize(floor - 1)
        assert llm.plan is before and llm.ram_budget == 2**30
        llm.resize(floor)
        assert llm.generate(IDS, max_tokens=N, **SAMPLING).tokens == expected


def test_a_closed_handle_says_so(model):
    llm = LLM(model, ram_budget="1GiB")
    llm.close()
    with pytest.raises(ClosedError):
        llm.resize("1GiB")


def test_what_is_given_up_leaves_memory(model):
    with LLM(model, ram_budget="1GiB") as llm:
        floor = floor_of(llm)
        before, kept = process_memory().rss, sum_kept(llm)
        llm.resize(floor)
        after = process_memory().rss
        given = kept - sum_kept(llm) - llm.plan.ledger["read-ahead ring"]
        assert given > 12 * MIB and before - after > given - MIB
        llm.resize(2**30)
        assert abs(process_memory().rss - before) < 2 * MIB


def sum_kept(llm) -> int:
    lines = llm.plan.ledger.lines()
    return sum(lines.get(label, 0) for label in LABELS.values())


@pytest.mark.parametrize("mode", ["sweep", "cached", "adaptive"])
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_store_shows_the_truth_after_any_history(tmp_path, codec, mode):
    model = Model(tmp_path / "m.flash", codec)
    store = model.store(model.share(0.9), mode=mode, ring_stages=3)
    most = dict(model.share(0.9))
    rng = np.random.default_rng(9)
    for step in range(40):
        run_step(model, store, rng, density=(0.02, 0.3, 0.9)[step % 3])
        share = rng.choice([0.0, 0.2, 0.5, 1.0])
        store.resize({k: int(n * share) for k, n in most.items()}, ring_stages=1 + step % 3)
        store.check()
    model.close()


def test_a_store_refuses_more_than_it_was_made_for(tmp_path):
    model = Model(tmp_path / "m.flash")
    store = model.store({"head": 3}, ring_stages=2)
    with pytest.raises(UsageError, match="head"):
        store.resize({"head": 4}, ring_stages=2)
    with pytest.raises(UsageError, match="stages"):
        store.resize({"head": 3}, ring_stages=3)
    run_step(model, store, np.random.default_rng(1))
    model.close()


def test_growth_that_cannot_be_read_leaves_a_store_that_works(tmp_path):
    from flashllm.storage.wrappers import FaultyStorage

    broken = []
    model = Model(
        tmp_path / "m.flash",
        wrap=lambda s: FaultyStorage(s, lambda *_: "fail" if broken else None),
    )
    most = dict(model.share(0.9))
    store = model.store(most)
    store.resize({}, ring_stages=2)
    broken.append(True)
    with pytest.raises(FlashReadError):
        store.resize(most, ring_stages=2)
    broken.clear()
    store.check()
    run_step(model, store, np.random.default_rng(1))
    store.resize(most, ring_stages=2)
    run_step(model, store, np.random.default_rng(2))
    model.close()


CHILD = """
import json, signal, sys
from flashllm import LLM
from flashllm.probe.process import process_memory

path, before, after = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with LLM(path, ram_budget=before, storage="direct") as llm:
    signal.signal(signal.SIGUSR1, lambda *_: llm.resize(after))
    tokens = []
    stream = llm.stream([3, 17, 40, 8, 8, 22, 61, 5], max_tokens=60, temperature=2.0,
                        seed=5, ignore_eos=True)
    for delta in stream:
        tokens += delta.tokens
        if len(tokens) == 3:
            print("running", flush=True)
        if llm.ram_budget == after and len(tokens) > 10:
            break
    stream.close()
    print(json.dumps({"tokens": tokens, "budget": llm.ram_budget, "rss": process_memory().rss}))
"""


@needs_cgroup
@pytest.mark.cgroup
def test_a_group_lowered_by_30_percent_mid_generation(tmp_path):
    """R-04: the engine is told first; the kernel then accepts the lower limit within 2 s."""
    import json

    from flashllm.probe.cgroup import MemoryGroup

    path = tmp_path / "m.flash"
    inflate(GOLDEN / "llama-relu", path, size_bytes=192 * MIB)
    # Library pages that others touched first are not charged here: some 30 MiB of the budget.
    before, after = 160 * MIB, 112 * MIB
    with MemoryGroup(before, name="flashllm-test-resize") as group:
        command = [sys.executable, "-c", CHILD, str(path), str(before), str(after)]
        child = group.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "running\n", child.stderr.read()
        assert group.charges().usage_bytes > after  # else nothing would be shown here
        child.send_signal(signal.SIGUSR1)
        accepted = lower_within(group, after, seconds=2.0)
        out, err = child.communicate(timeout=patience(120))
        assert child.returncode == 0, err
        charges = group.charges()
    told = json.loads(out)
    assert accepted and charges.oom_kills == 0
    assert told["budget"] == after and told["rss"] <= after
    with LLM(str(path), ram_budget="1GiB") as llm:
        n = len(told["tokens"])
        whole = llm.generate(IDS, max_tokens=n, **SAMPLING)
    assert whole.tokens == told["tokens"]


def lower_within(group, limit: int, *, seconds: float) -> bool:
    """Set the limit; version 1 refuses (EBUSY) while more than that cannot be reclaimed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            group.set_limit(limit)
            return True
        except OSError:
            os.sched_yield()
    return False
