"""Pictures: the numbers behind them, what files they are of, and drawing where matplotlib is."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from flashllm.benchmark.journal import read_journal
from flashllm.benchmark.table import as_json
from flashllm.cli.main import main
from flashllm.errors import FlashReadError, FormatError
from flashllm.plotting.charts import as_csv, rolling
from flashllm.plotting.draw import draw
from flashllm.plotting.of_bench import roofline
from flashllm.plotting.of_run import run_charts
from flashllm.plotting.of_trace import activity
from flashllm.plotting.sources import charts_of
from flashllm.predictors import open_fit
from flashllm.probe.named import CURVES
from flashllm.simulate import simulate
from flashllm.tracing import read_trace

from . import fits, tiny
from .test_benchmark import ROW

STORIES = Path(__file__).parent.parent / "traces" / "stories-test.fltrace"


@pytest.fixture(scope="module")
def run_lines(tmp_path_factory):
    """A journal of a tiny model that reads everything for every token."""
    folder = tmp_path_factory.mktemp("plot")
    model, out = str(tiny.container(folder)), folder / "run.jsonl"
    assert main(["generate", model, "--token-ids", "1,2,3", "-n", "7", "--ignore-eos", "--no-pin",
                 "--ram-budget", "2GiB", "--json", "--trace", str(out)]) == 0  # fmt: skip
    return out


@pytest.fixture
def bench_file(tmp_path):
    rows = [
        dataclasses.replace(ROW, cap=cap, cap_bytes=n, tokens_per_s=speed, test=test,
                            per_token_ms=ROW.per_token_ms if test == "tg4" else {})
        for cap, n, speed in (("100%", 200, 4.0), ("50%", 100, 2.0))
        for test in ("pp8", "tg4")
    ]  # fmt: skip
    rows.append(dataclasses.replace(ROW, cap="1%", failed="killed", per_token_ms={}))
    path = tmp_path / "ladder.json"
    path.write_text(as_json(rows, {"cpu": "abacus"}))
    return path


def test_a_journals_lines_sum_to_its_result(run_lines):
    facts, tokens, result = read_journal(run_lines)
    assert facts["ram_budget"] == 2 * 2**30 and [t["token"] for t in tokens] == list(range(7))
    for name in ("bytes_read", "reads", "hits", "misses"):
        assert sum(token[name] for token in tokens) == result["flash"][name]
    assert result["flash"]["bytes_read"] > 7 * 30_000  # nothing is kept
    for token in tokens[1:]:
        assert 0 < sum(token["parts_ms"].values()) <= token["ms"] and token["rss"] > 2**20
    spent = sum(token["ms"] for token in tokens[1:])
    assert spent == pytest.approx(result["timings"]["predicted_ms"], rel=0.5)


def test_charts_of_a_run_are_its_tokens(run_lines):
    facts, tokens, _ = read_journal(run_lines)
    cache, memory, parts = run_charts(facts, tokens)
    assert cache.series[1].y[-1] == pytest.approx(
        np.mean([t["bytes_read"] for t in tokens[1:]]) / 2**20
    )
    assert set(memory.series[1].y) == {2048.0}
    top = sum(series.y[0] for series in parts.series)
    assert top == pytest.approx(tokens[1]["ms"])


def test_the_heat_map_has_the_traces_shares():
    trace = read_trace(STORIES)
    chart = activity(trace)
    width = int(np.diff(chart.series[0].x)[0])
    for layer, series in enumerate(chart.series):
        bits = trace.bits(layer)
        assert len(series.x) == -(-trace.n_tokens // width) <= 200
        assert series.y[0] == pytest.approx(bits[:width].mean())
        assert series.y[-1] == pytest.approx(bits[series.x[-1] :].mean())


def test_sweeps_rise_with_the_cache_and_belady_is_above():
    charts = charts_of(STORIES, policies=["lru", "belady"], caches=[0.1, 0.5, 0.75])
    hits = {series.name: series.y for series in charts[1].series}
    assert list(hits) == ["lru", "belady"]
    assert hits["lru"] == sorted(hits["lru"]) and hits["belady"][1] > hits["lru"][1] + 10
    read = {series.name: series.y for series in charts[2].series}
    assert read["lru"] == sorted(read["lru"], reverse=True)


def test_speed_against_the_cache_is_that_of_the_simulators_flash():
    args = {"policies": ["lfu"], "caches": [0.25, 0.5]}
    speed = charts_of(STORIES, **args)[3].series[0]
    rows = simulate(read_trace(STORIES), per_frames=[1], curves=[CURVES["default"]], **args)
    assert speed.x == [25, 50]
    assert speed.y == pytest.approx([1e3 / row.ms["default"] for row in rows])


def test_charts_of_a_fit(tmp_path):
    fit = open_fit(fits.write(tmp_path / "m.flash.fit"))
    recall, memory = charts_of(fit.path)
    for layer, series in zip(fit.layers, recall.series, strict=True):
        assert series.y == pytest.approx([100 * r for r in layer.recall])
        # of 100 active bundles recall are found, among recall / precision that are read
        assert series.x == pytest.approx([r / p for r, p in zip(layer.recall, layer.precision,
                                                                strict=True)])  # fmt: skip
    assert memory.series[0].y == [layer.n_bytes / 1024 for layer in fit.layers]


def test_each_kind_of_file_gives_its_pictures(run_lines, bench_file, tmp_path):
    """The pictures that docs/MEASURING.md names, told by the file, as numbers and as a drawing."""
    fit = fits.write(tmp_path / "m.flash.fit")
    named = {
        STORIES: ["Active bundles by layer", "Hit rate against cache size",
                  "Bytes read against cache size", "Speed against cache size"],
        run_lines: ["Cache: ", "Memory", "Where a token's time goes"],
        bench_file: ["Speed against the cap", "Where a token's time goes", "Flash roofline"],
        fit: ["Recall against bytes read", "Predictors in memory"],
    }  # fmt: skip
    drawn = []
    for number, (path, titles) in enumerate(named.items()):
        out = tmp_path / f"{number}.csv"
        assert main(["plot", str(path), "-o", str(out), "--cache", "25%,50%"]) == 0
        found = list(dict.fromkeys(row["chart"] for row in csv.DictReader(out.open())))
        assert len(found) == len(titles)
        assert all(a.startswith(b) for a, b in zip(found, titles, strict=True))
        drawn += charts_of(path, **({"caches": [0.25, 0.5]} if path == STORIES else {}))
    pytest.importorskip("matplotlib")
    draw(drawn, tmp_path / "all.svg")
    picture = (tmp_path / "all.svg").read_text()
    assert picture.count("<g id=\"axes_") >= len(drawn)


def test_charts_of_a_ladder(bench_file):
    speed, parts, roof = charts_of(bench_file)
    assert speed.x.names == ("50%", "100%")  # from small to large, the killed one left out
    assert [s.y for s in speed.series if s.name == "tg4, tok/s"] == [[2.0, 4.0]]
    assert parts.x.names == ("100% tg4", "50% tg4")
    assert {s.name: s.y for s in parts.series} == {
        "wait": [4.0, 4.0], "ffn": [1.0, 1.0], "larger floor": [2.0, 2.0]
    }  # fmt: skip
    assert [s.mark for s in roof.series] == ["roof", "roof", "points", "points"]


def test_the_roofline_is_the_devices_rate():
    row = ROW.to_dict() | {"facts": {"device_bytes_per_s": 6 * 2**20}, "bytes_per_token": 3 * 2**20}
    device = roofline([row]).series[0]
    assert np.multiply(device.x, device.y) == pytest.approx(6.0)
    assert min(device.x) < 3 < max(device.x)


def test_rolling_means():
    assert rolling([1, 2, 3, 4], [1, 1, 1, 1], 2) == [1.0, 1.5, 2.5, 3.5]
    assert math.isnan(rolling([0], [0], 3)[0])


def test_csv_has_every_point(bench_file):
    charts = charts_of(bench_file)
    lines = list(csv.DictReader(io.StringIO(as_csv(charts))))
    assert len(lines) == sum(len(series.x) for chart in charts for series in chart.series)
    assert {"chart": "Where a token's time goes", "series": "wait", "x": "1", "x_name": "50% tg4",
            "y": "4.0", "x_label": "", "y_label": "ms per token"} in lines  # fmt: skip


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_picture_is_drawn(bench_file, tmp_path, suffix, magic):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"out.{suffix}"
    assert main(["plot", str(bench_file), "-o", str(out)]) == 0
    assert out.read_bytes().startswith(magic) and out.stat().st_size > 5000


def test_without_matplotlib_the_extra_is_named_and_csv_works(bench_file, tmp_path, monkeypatch,
                                                             capsys):  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(bench_file), "-o", str(tmp_path / "a.png")]) == 3
    assert "flashllm[plot]" in capsys.readouterr().err
    assert main(["plot", str(bench_file), "-o", str(tmp_path / "a.csv")]) == 0
    assert (tmp_path / "a.csv").read_text().startswith("chart,series,")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"flashllm_bench": 2}', '{"flashllm_bench": 1}',
     '{"flashllm_bench": 1, "rows": [{}]}', '{"flashllm_bench": 1, "rows": []}',
     '{"flashllm_run": 2}', '{"flashllm_run": 1}',
     '{"flashllm_run": 1, "model": "m", "ram_budget": "much"}',
     '{"flashllm_run": 1, "model": "m", "ram_budget": 5}\n{"token": 0}',
     '{"flashllm_run": 1, "model": "m", "ram_budget": 5}\nnothing', "\x89FLTRC\r\n", "\x89FLFIT"],
)  # fmt: skip
def test_what_is_no_picture(content, tmp_path, capsys):
    path = tmp_path / "odd"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(FormatError):
        charts_of(path)
    assert main(["plot", str(path), "-o", str(tmp_path / "a.csv")]) == 3


def test_a_missing_file_and_an_unknown_suffix(tmp_path, bench_file):
    with pytest.raises(FlashReadError):
        charts_of(tmp_path / "nothing")
    assert main(["plot", str(bench_file), "-o", str(tmp_path / "a.pdf")]) == 2


def test_a_run_that_was_cut_off_is_drawn(run_lines, tmp_path):
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(run_lines.read_text().splitlines(keepends=True)[:4]))
    assert read_journal(cut)[2] is None and len(charts_of(cut)) == 3
    assert json.loads(cut.read_text().splitlines()[0])["flashllm_run"] == 1
