"""The bench verb: what a rung does, what its table says, and that it says what went wrong."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import pytest

from flashllm.benchmark import ladder
from flashllm.benchmark.ladder import Row, climb
from flashllm.benchmark.table import HEAD, as_csv, as_json, markdown
from flashllm.cli.main import main
from flashllm.errors import UnsupportedError
from flashllm.stress import confine
from flashllm.stress.confine import make_warm
from flashllm.units import MIB

from . import tiny
from .capped import needs_cgroup


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.container(tmp_path_factory.mktemp("benchmark")))


def climbed(model, caps, *, tests=(("pp", 6), ("tg", 5)), repetitions=2, **engine):
    said = []
    rows = climb(model, caps=caps, tests=tests, repetitions=repetitions, engine=engine,
                 told=said.append)  # fmt: skip
    return rows, said


@needs_cgroup
@pytest.mark.cgroup
def test_rungs_are_cold_confined_and_say_the_same(model):
    make_warm(model)
    rows, said = climbed(model, ["200MiB", "100MiB"], pin=False)
    assert [(row.test, row.cap) for row in rows] == [
        ("pp6", "200MiB"), ("tg5", "200MiB"), ("pp6", "100MiB"), ("tg5", "100MiB")
    ]  # fmt: skip
    for row in rows:
        assert row.enforced == "memory cgroup" and row.cache == "cold" and row.cache_before == 0
        assert not row.failed and not row.note and row.tokens_per_s > 0 and row.tokens_per_s_sd >= 0
        assert len(row.samples) == 2 and row.oom_kills == 0 and row.peak_rss <= row.cap_bytes
        assert row.bytes_per_token > 0 and 0 < row.stall < 1 and row.time_over_floor > 0
    assert rows[1].per_token_ms.keys() >= {"wait", "ffn", "python"} and not rows[0].per_token_ms
    assert [s["said"] for s in rows[0].samples] == [s["said"] for s in rows[2].samples]
    assert len({s["said"] for s in rows[1].samples}) == 2  # repetitions differ
    assert len(said) == 8 and "tok/s" in said[0]


def test_the_verb_shortens_refuses_and_says_how_it_was_limited(model, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise UnsupportedError("no groups here")

    monkeypatch.setattr(confine, "MemoryGroup", refuse)
    args = ["bench", model, "-p", "100000", "-n", "0", "-r", "1", "-o", "json"]
    assert main([*args, "--cap", "40MiB,200MiB"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["flashllm_bench"] == 1 and report["cpu"]
    refused, row = report["rows"]
    assert refused["failed"].startswith("refused: the floor is") and refused["test"] == "pp100000"
    n = row["samples"][0]["n"]
    assert row["test"] == f"pp{n}" and n == row["facts"]["n_context"] - 1 < 100000
    assert row["note"] == "pp100000 shortened to the context"
    assert row["enforced"] == "RLIMIT_DATA" and row["peak_cgroup"] is None
    assert row["tokens_per_s_sd"] is None
    assert "40MiB: pp100000 refused" in err and "no memory cgroup here" in err


@pytest.mark.parametrize("args", [["-p", "0", "-n", "0"], ["-p", "x"], ["-n", "-1"], ["-r", "0"],
                                  ["--cap", "half"]])  # fmt: skip
def test_what_cannot_be_measured_is_a_usage_error(model, args, capsys):
    assert main(["bench", model, *args]) == 2
    assert "flashllm:" in capsys.readouterr().err


ROW = Row(
    "tg4", "50%", 100 * MIB, "memory cgroup", "m.flash", tokens_per_s=2.0, tokens_per_s_sd=0.25,
    hit_rate=0.5, bytes_per_token=3 * MIB, reads_per_token=9.0, stall=0.625, time_over_floor=1.5,
    floor_ms={"dram": 1.0, "flash": 2.0}, per_token_ms={"wait": 4.0, "ffn": 1.0},
    peak_rss=90 * MIB, samples=({"tokens_per_s": 2.0, "said": "a"},),
    facts={"family": "llama", "weight_type": "int8", "parameters": 1_500_000_000,
           "file_bytes": 200 * MIB, "kernels": "avx2", "storage": "direct", "n_threads": 2},
)  # fmt: skip


def cells(text: str, line: int) -> list[str]:
    return [cell.strip() for cell in text.splitlines()[line].strip("|").split("|")]


def test_the_table_has_llama_benchs_columns():
    text = markdown([ROW], {"cpu": "abacus"})
    assert cells(text, 0) == list(HEAD)
    assert cells(text, 2) == [
        "m.flash llama int8", "200.0 MiB", "1.50 B", "avx2, direct", "2", "50% (100 MiB)",
        "90 MiB", "tg4", "2.00 ± 0.25", "50.0", "3.00", "62.5", "cold", "1.50",
    ]  # fmt: skip
    assert cells(text, 6) == ["50%", "tg4", "4.00", "1.00", "1.00", "2.00"]
    assert "cpu: abacus" in text and "limit: memory cgroup" in text
    prompt = dataclasses.replace(ROW, test="pp4", floor_ms={"dram": 2.0, "flash": 1.0})
    assert cells(markdown([prompt], {}), 2)[-1] == "-"


def test_csv_and_json_carry_every_number():
    (line,) = csv.DictReader(io.StringIO(as_csv([ROW], {"cpu": "abacus"})))
    assert line["cpu"] == "abacus" and float(line["stall"]) == 0.625
    assert line["per_token_ms.wait"] == "4.0" and line["facts.family"] == "llama"
    (row,) = json.loads(as_json([ROW], {}))["rows"]
    assert row["samples"] == [{"tokens_per_s": 2.0, "said": "a"}] and row["cache"] == "cold"


def test_other_tokens_and_a_warm_cache_are_told():
    other = dataclasses.replace(ROW, samples=({"tokens_per_s": 2.0, "said": "b"},))
    failed = dataclasses.replace(ROW, failed="killed", samples=())
    rows = ladder.same_tokens([ROW, other, failed, ROW])
    assert [row.note for row in rows] == ["", "other tokens", "", ""]
    assert dataclasses.replace(ROW, cache_before=5 * MIB).cache == "5 MiB cached"


def test_rungs_of_several_calls_are_one_card(tmp_path, monkeypatch):
    source = Path(__file__).parent.parent / "bench/ladder.py"
    spec = importlib.util.spec_from_file_location("bench_ladder", source)
    join = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(join)
    small = dataclasses.replace(ROW, cap="10%", cap_bytes=ROW.cap_bytes // 5)
    other = dataclasses.replace(small, samples=({"tokens_per_s": 2.0, "said": "b"},))
    about = {"cpu": "abacus"}
    calls = [json.loads(as_json([row], about)) for row in (other, ROW)]
    rows, told = join.joined(calls)
    assert [(row.cap, row.note) for row in rows] == [(ROW.cap, ""), ("10%", "other tokens")]
    assert told == about
    with pytest.raises(SystemExit, match="one machine"):
        join.joined([calls[0], calls[1] | {"cpu": "another"}])
    for i, told in enumerate(calls):
        (tmp_path / f"{i}.json").write_text(json.dumps(told))
    out = tmp_path / "card"
    monkeypatch.setattr("sys.argv", ["ladder.py", f"{tmp_path}/0.json", f"{tmp_path}/1.json",
                                     "--note", "a model", "--out", str(out)])  # fmt: skip
    assert join.main() == 0
    written, text = json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md")
    assert join.rows_of(written) == rows and written["note"] == "a model"
    assert "other tokens" in text.read_text() and "| t/s |" in text.read_text()
