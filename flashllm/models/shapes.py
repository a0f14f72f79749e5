"""What a config says a model is made of, held against what a container has.

The container's own rules are about bytes: a plane's items, pieces and frames.  That they are those
of this family and config is checked here, once, when a container is opened; models and kernels
then believe it.  Neither more nor less may be there: a model asks for some planes and vectors only
where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import FormatError
from .base import ModelConfig, PlaneRole, bundling


def check_shapes(
    config: ModelConfig, planes: Mapping[str, Any], vectors: Mapping[str, Any], path: object
) -> None:
    """FormatError, naming plane or vector, unless they are those of `config.shape_roles()`.

    `planes` are the container's; `vectors` name -> (shape, …).
    """
    if config.n_layers > len(planes):  # before a role for each of thousands is made
        raise FormatError(path, "planes", f"those of {config.n_layers} layers", len(planes))
    roles = config.shape_roles()
    if (arranged := bundling(planes)) is not None:
        roles = roles.arranged(arranged)
    _same_names(path, "plane", [role.name for role in roles.planes], planes)
    _same_names(path, "vector", [role.name for role in roles.vectors], vectors)
    for role in roles.planes:
        _check_plane(path, role, planes[role.name])
    for vector in roles.vectors:
        found = vectors[vector.name][0]
        if found != (vector.length,):
            raise FormatError(path, f"vector {vector.name}", f"shape ({vector.length},)", found)


def _same_names(path: object, kind: str, wanted: list[str], found: Collection[str]) -> None:
    for name in wanted:
        if name not in found:
            raise FormatError(path, f"{kind} {name}", f"a {kind} of that name", "nothing")
    for name in sorted(set(found) - set(wanted)):
        raise FormatError(path, f"{kind} {name}", "one that the config names", "another")


def _check_plane(path: object, role: PlaneRole, plane: Any) -> None:
    first = role.groups()[0]
    names = ["row"] if role.kind == "rows" else [name for name, _ in first]
    sides = (
        ("kind", role.kind, plane.kind),
        ("items", role.n_items, plane.n_items),
        ("pieces", names, [piece.name for piece in plane.pieces]),
        ("columns", [tensor.n_cols for _, tensor in first],
         [piece.n_cols for piece in plane.pieces]),
    )  # fmt: skip
    for what, expected, found in sides:
        if expected != found:
            raise FormatError(path, f"plane {role.name}: {what}", expected, found)
