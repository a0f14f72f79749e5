"""The container room: one converted model in one file.  FORMAT.md is its contract.

Names are resolved on first use: opening a file needs neither the writer nor the verifier.
"""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "Container": "reader",
    "ContainerWriter": "writer",
    "Piece": "base",
    "Plane": "base",
    "PlaneShape": "base",
    "lay_out_pieces": "base",
    "make_file_id": "writer",
    "open_container": "reader",
    "verify": "verification",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
