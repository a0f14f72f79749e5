"""The small model that comes with the package."""

from __future__ import annotations

from pathlib import Path

NAME = "demo.flash"


def bundled_model() -> str:
    """Path of the bundled container (its card is data/README.md in the package).

    Packages are installed as files, so this is a path on disk and not a resource in an archive.
    """
    return str(Path(__file__).parent / "data" / NAME)
