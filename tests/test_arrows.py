"""Who may import whom: the table of DESIGN's rooms, read from the code's own imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "flashllm"
LEAVES = {"errors", "units", "registry", "durable", "regular"}

# room -> rooms it may import besides the leaves and itself
ARROWS = {
    "errors": set(),
    "units": set(),
    "registry": set(),
    "durable": set(),
    "regular": set(),
    "settings": set(),
    "__init__": set(),
    "quant": set(),
    "codecs": {"_core"},
    "storage": {"_core"},
    "container": {"quant", "codecs", "storage", "_core"},
    "cache": set(),
    "predictors": {"kernels"},
    "kernels": {"quant", "_core"},
    "offload": {"container", "cache", "_core"},
    "models": {"kernels", "predictors", "offload"},
    "engine": {"models", "cache"},
    "checkpoints": set(),
    "tokenization": set(),
    "conversion": {
        "checkpoints", "models", "container", "quant", "codecs", "predictors", "tracing", "_core",
    },
    # the format's checksums, and the one reader of hostile zstd frames
    "tracing": {"codecs", "_core"},
    # of offload only what decides without files: planner, the rules of pick, the numbers
    "simulate": {"tracing", "cache", "predictors", "offload"},
    "probe": {"storage", "kernels", "_core"},
    "planning": {"cache"},
    "watch": {"probe"},
    "floors": {"probe"},
    "governor": {"probe"},
    "bundled": set(),
    "stress": {"api", "probe", "storage"},
    # of predictors only the manifest of a fit, of benchmark only its files
    "plotting": {"benchmark", "predictors", "probe", "simulate", "tracing"},
    # of engine only the shape of a result, and sums
    "benchmark": {"api", "engine", "probe", "stress"},
}
EVERYTHING = {"api", "assembly", "calibration", "cli", "evaluation", "__main__"}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """First path component, below the package, of everything a file imports from us."""
    package = ("flashllm", *path.relative_to(ROOT).parent.parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += (node.module or "").split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        rooms |= {t[1] for t in targets if t[0] == "flashllm" and len(t) > 1}
    return {room for room in rooms if not room.startswith("__")}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_its_row_names(path):
    room = room_of(path)
    if room in EVERYTHING:
        return
    allowed = ARROWS[room] | LEAVES | {room}
    assert imported_rooms(path) <= allowed


def test_the_reader_of_imports_sees_a_forbidden_arrow(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "quant").mkdir()
    bad = tmp_path / "quant" / "bad.py"
    bad.write_text("from ..container import reader\nimport flashllm.cache.arena\n")
    assert imported_rooms(bad) == {"container", "cache"}
