"""The page of promises names tests that exist, and no promise is without one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from .mutate import BREAKS

HERE = Path(__file__).parent
PAGES = {"PROMISES.md": HERE.parent / "docs/PROMISES.md", "MUTATIONS.md": HERE / "MUTATIONS.md"}
LINK = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
PROMISES = [*range(1, 15), 21]
CHECKS = [*range(1, 13), *range(20, 30), 31, *range(50, 62), 70, 71, 72, 73, 75, 76, 77, 78]


def links(page: str) -> list[tuple[str, str]]:
    found = LINK.findall(PAGES[page].read_text())
    assert found, f"{page} names no test"
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_is_a_test(page):
    tests: dict[str, set[str]] = {}
    for file, name in links(page):
        if file not in tests:
            tree = ast.parse((HERE / file).read_text())
            tests[file] = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert name in tests[file], f"{page}: {file}::{name}"


def test_a_missing_test_would_be_seen(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("`test_promises.py::test_that_nobody_wrote`")
    monkeypatch.setitem(PAGES, "PROMISES.md", page)
    with pytest.raises(AssertionError, match="nobody_wrote"):
        test_every_link_is_a_test("PROMISES.md")


@pytest.mark.parametrize("number", PROMISES)
def test_every_promise_has_a_test(number):
    text = PAGES["PROMISES.md"].read_text()
    part = re.search(rf"^\*\*P{number}\. .*?(?=^\*\*P|^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert part and LINK.search(part[0]), f"P{number}"


@pytest.mark.parametrize("number", CHECKS)
def test_every_check_has_a_row(number):
    rows = [r for r in PAGES["PROMISES.md"].read_text().splitlines() if r.startswith("| R-")]
    mine = [row for row in rows if f"R-{number:02}" in row.split("|")[1]]
    assert len(mine) == 1 and LINK.search(mine[0]), f"R-{number:02}"


def broken() -> list[list[str]]:
    """The cells of every row of the list of breaks: promise, name, ..."""
    rows = PAGES["MUTATIONS.md"].read_text().splitlines()
    return [[cell.strip() for cell in row.split("|")[1:3]] for row in rows if row[:3] == "| P"]


@pytest.mark.parametrize("number", PROMISES)
def test_every_promise_was_broken_on_purpose(number):
    assert f"P{number}" in {promise for promise, _ in broken()}


def test_the_list_of_breaks_is_what_is_made():
    """`ignore the cap in prefill` stands in one row for two."""
    made = {name.split(":")[0] for name in BREAKS}
    assert made == {name for _, name in broken()}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_finds_its_place(name):
    """So that the list does not age: the text to be replaced stands once where it is said to."""
    one = BREAKS[name]
    assert (HERE.parent / one.file).read_text().count(one.old) == 1
