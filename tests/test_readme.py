"""What README shows, run as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from .patience import patience

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    """Fenced blocks of `language` ("" for those that name none)."""
    found, inside = [], None
    for line in README.read_text().splitlines():
        if not line.startswith("```"):
            if inside is not None:
                inside[1].append(line)
        elif inside is None:
            inside = (line[3:], [])
        else:
            found.append(("\n".join(inside[1]), inside[0]))
            inside = None
    return [text for text, named in found if named == language]


def test_the_python_example_runs():
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, timeout=patience(120)
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout and len(done.stdout) > 100


def test_linked_pages_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target


def test_verbs_shown_are_verbs():
    from flashllm.cli.main import ALIASES, VERBS

    shown = set(re.findall(r"flashllm ([a-z]+)", "\n".join(blocks(""))))
    assert shown and shown <= set(VERBS) | set(ALIASES)
