"""A card: markdown to read, and beside it JSON with every raw number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_card(out: Path, raw: Any, text: str) -> None:
    """Writes out.json and out.md."""
    out.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n")
    out.with_suffix(".md").write_text(text)
