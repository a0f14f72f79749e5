"""The card of the long checks: every part runs, a failing one is seen, old rows are kept."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "bench/long.py"


@pytest.fixture
def long(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_long", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PARTS", {"good": "python -c print(1)", "bad": "python -c 1/0"})
    monkeypatch.setattr(module, "NEEDED", {"good": "json"})
    return module


def run(long, monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["long.py", *map(str, arguments)])
    return long.main()


def test_every_part_runs_and_a_failure_is_told(long, monkeypatch, tmp_path):
    out = tmp_path / "card"
    long.PARTS = dict(reversed(long.PARTS.items()))
    assert run(long, monkeypatch, "--out", out) == 1
    told = json.loads(out.with_suffix(".json").read_text())
    assert {name: part["code"] for name, part in told.items()} == {"bad": 1, "good": 0}
    assert told["good"]["last"] == ["1"] and "ZeroDivisionError" in told["bad"]["last"][-1]
    text = out.with_suffix(".md").read_text()
    assert "| bad | `python -c 1/0` | 1 |" in text and "ZeroDivisionError" in text


def test_a_part_alone_keeps_the_others_rows(long, monkeypatch, tmp_path):
    out = tmp_path / "card"
    assert run(long, monkeypatch, "bad", "--out", out) == 1
    assert run(long, monkeypatch, "good", "--out", out) == 0
    assert list(json.loads(out.with_suffix(".json").read_text())) == ["good", "bad"]


def test_a_part_that_cannot_run_says_so(long, monkeypatch, tmp_path, capsys):
    long.NEEDED = {"good": "a_module_that_is_not_there"}
    assert run(long, monkeypatch, "good", "--out", tmp_path / "card") == 0
    assert "good: left out" in capsys.readouterr().out
    assert not (tmp_path / "card.json").exists()
