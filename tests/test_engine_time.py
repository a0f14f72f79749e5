"""Where a token's time goes, and the floors under it: parts that sum, phases that are credited."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from flashllm import LLM, _core
from flashllm.engine.totals import Share
from flashllm.floors import Floors, Touched
from flashllm.kernels.base import FFN, PHASES, PREDICT
from flashllm.models.decoder import DecoderModel
from flashllm.offload.stats import StepStats
from flashllm.probe import dram
from flashllm.probe.curve import DEFAULT_CURVE
from flashllm.probe.dram import LEAST_BYTES, read_bytes_per_s

from . import tiny

PARTS = {"wait", "decode", "submit", "attention", "predict", "ffn", "head", "python", "sampling",
         "other"}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("time")
    return {name: str(tiny.container(folder, name)) for name in ("llama-relu", "qwen2-moe", "opt")}


@pytest.mark.parametrize("name", ["llama-relu", "qwen2-moe", "opt"])
@pytest.mark.parametrize("pin", [True, False])
def test_parts_of_a_token_sum_to_its_time(models, name, pin):
    with LLM(models[name], ram_budget="2GiB", pin=pin) as llm:
        result = llm.generate([1, 2, 3], max_tokens=9, ignore_eos=True, temperature=0)
    parts, flash = result.timings["per_token_ms"], result.flash
    assert parts.keys() == PARTS
    assert sum(parts.values()) == pytest.approx(result.timings["predicted_ms"] / 8)
    assert all(value >= 0 for value in parts.values())
    # every phase has work in these models, and the clock saw it
    assert all(parts[phase] > 0 for phase in PHASES)
    # embedding rows are read where a model keeps everything else
    assert pin or flash["bytes_per_token"] > 10_000 and min(parts["wait"], parts["submit"]) > 0
    assert (flash["bytes_per_token"] > 0) == (flash["floor_ms"]["flash"] > 0)
    assert flash["floor_ms"]["dram"] > 0 and flash["time_over_floor"] > 0


def test_a_coded_model_tells_waiting_for_reads_from_waiting_for_decoding(tmp_path):
    model = tiny.container(tmp_path, codec="zstd")
    with LLM(str(model), ram_budget="2GiB", pin=False) as llm:
        result = llm.generate([1, 2, 3], max_tokens=9, ignore_eos=True, temperature=0)
    assert result.timings["per_token_ms"]["decode"] > 0
    assert result.timings["per_token_ms"]["wait"] >= 0
    assert result.flash["decompress_ms"] > 0


def test_one_token_has_no_decode_step(models):
    with LLM(models["llama-relu"], ram_budget="2GiB") as llm:
        result = llm.generate([1, 2, 3], max_tokens=1)
    assert result.timings["per_token_ms"] == {} and result.flash["floor_ms"] == {}
    assert result.flash["time_over_floor"] is None


def test_reference_kernels_are_python(models):
    with LLM(models["llama-relu"], ram_budget="2GiB", kernels="reference") as llm:
        parts = llm.generate([1], max_tokens=3, ignore_eos=True).timings["per_token_ms"]
    assert all(parts[phase] == 0 for phase in PHASES) and parts["python"] > 0


@pytest.mark.parametrize("phase, slow", [(FFN, "activate"), (PREDICT, "active_ids")])
def test_the_clock_credits_the_phase_that_is_set(models, phase, slow):
    """activate runs in the FFN only, active_ids where the active set is found only."""
    with LLM(models["llama-relu"], ram_budget="2GiB") as llm:
        seen = []
        whole = getattr(llm.kernels, slow)

        def watched(*args):
            before = llm.kernels.clock.spent()
            out = whole(*args)
            seen.append([b - a for a, b in zip(before, llm.kernels.clock.spent(), strict=True)])
            return out

        setattr(llm.kernels, slow, watched)
        llm.generate([1, 2], max_tokens=3, ignore_eos=True)
    spent = np.array(seen).sum(axis=0)
    assert spent[phase] > 0 and np.delete(spent, phase).sum() == 0


def test_sums_of_a_share():
    share = Share()
    stats = StepStats(wait_ns=3_000_000, decode_wait_ns=1_000_000, submit_ns=500_000, bytes_read=10)
    for _ in range(2):
        share.add(StepStats(**stats.as_dict()), tokens=1, wall_ns=10_000_000, length=5,
                  phases=("a", "b"), before=(0, 7), after=(2_000_000, 7))  # fmt: skip
    assert share.steps == 2 and share.positions == 10 and share.counters()["bytes_read"] == 20
    means = {"wait": 2.0, "decode": 1.0, "submit": 0.5, "a": 2.0, "b": 0.0, "python": 4.5}
    assert share.mean_ms(share.steps) == means


def test_floors_are_bytes_over_rates():
    share = Share()
    stats = StepStats(hits=30, misses=10, reads=20, bytes_read=20 * 65536, prefetch_reads=4,
                      prefetch_bytes=4 * 65536)  # fmt: skip
    share.add(stats, tokens=1, wall_ns=1, length=100, phases=(), before=(), after=())
    floors = Floors(DEFAULT_CURVE, Touched(1000, 10.0, 5), lambda: [], 1)
    assert floors.touched.mean(share) == 1000 + 400 + 500
    assert floors.of(share) == {"flash": pytest.approx(1e3 * DEFAULT_CURVE.seconds(24, 65536))}
    floors._dram = 1e9
    assert floors.of(share)["dram"] == pytest.approx(1900 / 1e6)


def test_dram_is_measured_where_it_is_asked_to():
    assert read_bytes_per_s([], n_threads=2) is None
    memory = [np.ones(n, np.uint8) for n in (2**20 + 5, 7, 2**22)]
    start = time.perf_counter()
    rate = read_bytes_per_s(memory, n_threads=2)
    assert LEAST_BYTES / (time.perf_counter() - start) < rate < 1e13


def test_dram_is_measured_on_other_bytes_each_time(monkeypatch):
    """What was just read may lie in a cache; arrays of odd lengths end a stretch and begin it."""
    seen = []
    monkeypatch.setattr(dram, "or_words", lambda words: seen.append(words))
    monkeypatch.setattr(dram, "MOST_BYTES", 8 * 100)
    monkeypatch.setattr(dram, "LEAST_BYTES", 1)
    whole = np.arange(530, dtype=np.uint64)
    cuts = [np.frombuffer(part.tobytes() + b"odd", np.uint8) for part in np.split(whole, [7, 140])]
    assert dram.read_bytes_per_s(cuts, n_threads=1) > 0
    assert np.concatenate(seen).tolist() == list(range(300))
    seen.clear()
    monkeypatch.setattr(dram, "REPEATS", 7)  # once round and on
    dram.read_bytes_per_s(cuts, n_threads=1)
    assert np.concatenate(seen).tolist() == [*range(530), *range(170)]


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 5000])
def test_words_are_all_looked_at(n):
    words = np.left_shift(np.uint64(1), np.arange(n, dtype=np.uint64) % np.uint64(64))
    assert _core.or_words(words) == int(np.bitwise_or.reduce(words, initial=0))


def test_phases_have_one_source():
    assert DecoderModel.phases is PHASES


def test_every_operator_is_timed():
    """By its source: a new operator that leaves the lock and not the clock would hide in python."""
    source = (Path(__file__).parent.parent / "ext" / "_core.pyx").read_text()
    body = source[source.index("cdef class NativeKernels") :].split("# ----")[0]
    repeat = body[body.index("    def repeat(") : body.index("    def prepare(")]
    assert "ns[recording.calls[i].phase] += now_ns() - started" in repeat
    arriving = body[body.index("    cdef int make_arriving(") : body.index("    def linear(")]
    assert "ns[0] += now_ns() - started" in arriving
    body = body.replace(repeat, "").replace(arriving, "")
    n_operators = body.count("        with nogil:")
    assert body.count("cdef int64_t started = now_ns()") == n_operators > 9
    assert body.count("self.clock.add(started)") == n_operators
