"""The stress verb: what it runs, what it sees from outside, and that it can fail."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from flashllm.cli import main as cli
from flashllm.errors import UnsupportedError
from flashllm.stress import cases
from flashllm.stress.cases import Row, Scale, Stress
from flashllm.stress.confine import cached_bytes, can_confine, make_cold, make_warm, run_child
from flashllm.units import MIB

from . import tiny
from .capped import needs_cgroup

SCALE = Scale(seconds=0.1, tokens=10, n_context=32, prompts=20, every_cell=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.container(tmp_path_factory.mktemp("stress")))


def stream(model, budget, **more):
    return {"work": "stream", "model": model, "engine": {"ram_budget": budget}, "tokens": 10,
            "seconds": 0.1, **more}  # fmt: skip


def test_a_child_is_seen_from_outside(model):
    seen = run_child(stream(model, "300MiB"), None)
    assert seen.code == 0 and 8 <= len(seen.report["tokens"]) <= 10
    assert seen.event("planned") and seen.n_samples > 0
    assert 10 * MIB < seen.peak_anon < seen.peak_rss
    assert seen.peak_rss <= seen.report["peak_rss"] + MIB  # the counters lag by some pages


def test_without_a_group_the_child_limits_its_own_memory(model):
    seen = run_child(stream(model, "70MiB", limit_data=True), None)
    assert seen.code == 0, seen.stderr


def test_what_a_child_may_not_have_is_refused_it():
    code = (
        "from flashllm.stress.reporting import limit_data\n"
        f"limit_data({100 * MIB})\n"
        "for n in (30, 300):\n"
        "    try: print(n, len(bytearray(n << 20)))\n"
        "    except MemoryError: print(n, 'refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"30 {30 * MIB}", "300 refused"], done.stderr


def test_the_same_rows_where_no_group_may_be_made(model, monkeypatch):
    def refuse(*args, **named):
        raise UnsupportedError("not here")

    monkeypatch.setattr("flashllm.stress.confine.MemoryGroup", refuse)
    assert can_confine() == "not here"
    stress = Stress(model, small=model, scale=SCALE, told=lambda row: None)
    floor, whole = stress._floor(), stress._reference(stress._spec("stream"))["tokens"]
    stress._cell(floor + 40 * MIB, "pread", "cold", floor, whole)
    stress._refusal(floor)
    ran, refused = stress.rows
    assert ran.breaches == refused.breaches == () and ran.identical
    assert ran.cgroup_peak is ran.failcnt is None
    assert 10 * MIB < ran.peak_anon < ran.peak_rss <= ran.cap
    assert ran.n_samples > 10
    stress._cell(floor + 40 * MIB, "pread", "cold", floor, whole[::-1])
    assert stress.rows[-1].breaches == ("tokens differ",)


def test_a_refused_budget_is_a_code_and_a_floor(model):
    seen = run_child(stream(model, 1), None)
    assert seen.code == 4 and seen.event("refused")["floor"] > 30 * MIB


def test_cold_and_warm_are_what_they_say(model):
    assert make_warm(model) > 0 and cached_bytes(model) > 0
    assert make_cold(model) == 0


@needs_cgroup
@pytest.mark.cgroup
def test_lowered_mid_run_and_long_context(model):
    stress = Stress(model, small=model, scale=SCALE, told=lambda row: None)
    floor, whole = stress._floor(), stress._reference(stress._spec("stream"))["tokens"]
    stress._lowered(floor, whole)
    stress._long_context()
    assert [row.breaches for row in stress.rows] == [(), ()]
    assert all(row.identical and row.oom_kills == 0 for row in stress.rows)
    wrong = [token + 1 for token in whole]
    stress._cell(floor + 40 * MIB, "direct", "cold", floor, wrong)
    assert stress.rows[-1].breaches == ("tokens differ",)


@pytest.mark.parametrize("every", [False, True])
def test_every_backend_is_tried_at_its_own_floor(model, every):
    scale = dataclasses.replace(SCALE, every_cell=every)
    stress = Stress(model, small=model, scale=scale, told=lambda row: None)
    floors = {"direct": 50 * MIB, "pread": 60 * MIB, "mmap": 70 * MIB}
    least = {(cap, storage) for cap, storage, _ in stress._cells(floors) if cap > 50 * MIB}
    assert least == {(floor + cases.STEP, storage) for storage, floor in floors.items()}


GOOD = Row("cap", "direct", "cold", 100, peak_rss=100, failcnt=0, oom_kills=0)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"peak_rss": 101}, "RSS"),
        ({"oom_kills": 1}, "kills"),
        ({"failcnt": 1}, "limit hit"),
    ],
)
def test_what_is_a_breach(change, said):
    assert cases._judge(GOOD) == []
    (breach,) = cases._judge(dataclasses.replace(GOOD, **change))
    assert said in breach


def test_a_soak_leaves_everything_as_it_was(model):
    spec = stream(model, "300MiB", work="soak", soak=0.1)
    seen = run_child(spec, None)
    assert seen.code == 0, seen.stderr
    assert seen.report["rounds"] >= 20 and seen.report["changed"] == []


def soaked(change=None, **late):
    bins = [
        {"rss": 50 * MIB, "anon": 40 * MIB, "charge": 45 * MIB, "tokens": 32, "seconds": 2.0,
         "cpu_s": 2.0} for _ in range(20)
    ]  # fmt: skip
    bins[0]["rss"] = 40 * MIB  # the first twentieth is no standard
    for number in range(15, 20):
        bins[number] |= late
    return {"bins": bins, "rounds": 20, "changed": change or []}


@pytest.mark.parametrize(
    "report, said",
    [
        (soaked(), []),
        (soaked(["threads"]), ["threads changed"]),
        (soaked(rss=55 * MIB), [f"memory grew by {5 * MIB}"]),
        (soaked(seconds=9.0), []),  # somebody else had the machine
        (soaked(cpu_s=5.0), ["slower: 16.00 tokens per CPU second, then 6.40"]),
    ],
)
def test_what_breaks_a_soak(report, said):
    assert cases._soaked(report)[1] == said


def test_the_course_of_a_soak():
    report = soaked(rss=52 * MIB)
    report["bins"][7] |= {"tokens": 0, "rss": 0}  # frozen, or one round took all of it
    assert cases._course(report) == (
        "20 rounds, MiB at start, middle, end: RSS 50.0 50.0 52.0, anon 40.0 40.0 40.0, "
        "group 45.0 45.0 45.0"
    )


@pytest.mark.parametrize("breaches, code", [((), 0), (("tokens differ",), 1)])
def test_the_exit_code_tells(model, monkeypatch, capsys, breaches, code):
    row = dataclasses.replace(GOOD, breaches=breaches)
    monkeypatch.setattr("flashllm.cli.stress.Stress.run", lambda self, only: [row] * len(only))
    assert cli.main(["stress", model, "--json", "--only", "caps"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["breaches"] == len(breaches) and told["rows"][0]["cap"] == 100
