"""From a checkpoint's own words to a model that can be planned: config, roles, tensor names.

Everything that the checkpoint says about itself and that its tensors contradict is settled here,
and each decision that a person should know about becomes a warning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from ..checkpoints import STORAGE_DTYPES, Checkpoint, part_of
from ..errors import CheckpointError, UnsupportedError
from ..models.base import ModelConfig, PlaneRole, Roles, TensorRole
from ..models.configs import config_from_dict, config_from_hf
from ..models.fields import Fields, token_ids

_COMPARE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Resolved:
    """`names`: for every TensorRole of `roles` the checkpoint tensor that plays it."""

    config: ModelConfig
    roles: Roles
    names: dict[TensorRole, str]
    warnings: list[str]


def resolve(checkpoint: Checkpoint) -> Resolved:
    """CheckpointError for missing or misshapen tensors; UnsupportedError for types not read."""
    warnings: list[str] = []
    if checkpoint.normalised:
        config = config_from_dict(*checkpoint.normalised, path=checkpoint.path)
    else:
        config = config_from_hf(checkpoint.config, warnings)
        config = _with_generation_ids(config, checkpoint, warnings)
        config = _as_the_tensors_are(config, checkpoint, warnings)
    if config.n_layers > len(checkpoint.names()):
        where = f"layers of {len(checkpoint.names())} tensors"
        raise CheckpointError(checkpoint.path, where, "one or more tensors each", config.n_layers)
    roles = config.roles()
    names = {}
    for plane in roles.planes:
        for _, tensor in plane.tensors:
            names[tensor] = _find(checkpoint, tensor)
    for vector in roles.vectors:
        for part in vector.parts:
            names[part] = _find(checkpoint, part)
    _warn_of_unused(config, checkpoint, roles, set(names.values()), warnings)
    return Resolved(config, roles, names, warnings)


def _find(checkpoint: Checkpoint, tensor: TensorRole) -> str:
    for name in tensor.names:
        if name not in checkpoint:
            continue
        if checkpoint.shape(name) != tensor.shape:
            raise CheckpointError(
                checkpoint.path,
                f"shape of {name!r}",
                list(tensor.shape),
                list(checkpoint.shape(name)),
            )
        if checkpoint.dtype(name) not in STORAGE_DTYPES:
            raise UnsupportedError(
                f"{checkpoint.path}: tensor {name!r} has type {checkpoint.dtype(name).upper()}, "
                f"which is not read; known: {', '.join(STORAGE_DTYPES)}"
            )
        return name
    raise CheckpointError(checkpoint.path, f"tensor {tensor.names[0]!r}", "a tensor", "nothing")


def _with_generation_ids(
    config: ModelConfig, checkpoint: Checkpoint, warnings: list[str]
) -> ModelConfig:
    """generation_config.json may know more ends of a sequence than config.json does."""
    generation = checkpoint.generation_config
    if generation.get("eos_token_id") is None:
        return config
    source = Fields(generation, "generation_config.json")
    ids, notes = token_ids(source, "eos_token_id", config.vocab_size)
    warnings += [note for note in notes if note not in warnings]
    merged = tuple(dict.fromkeys((*config.eos_ids, *ids)))
    return replace(config, eos_ids=merged)


def _as_the_tensors_are(
    config: ModelConfig, checkpoint: Checkpoint, warnings: list[str]
) -> ModelConfig:
    """The config corrected where the tensors decide: an absent gate, an absent or second head."""
    names = checkpoint.names()
    has_gate = any(".mlp.gate_proj." in name for name in names)
    if config.gated and not has_gate and any(".mlp.up_proj." in name for name in names):
        warnings.append("the checkpoint has no gate_proj: its FFN is taken as ungated")
        config = replace(config, gated=False)
    if not config.tied and not any(name in checkpoint for name in _head_names(config)):
        warnings.append("lm_head.weight is absent: the embedding is used as the head")
        return replace(config, tied=True)
    if config.tied and "lm_head.weight" in checkpoint:
        embed = next(
            (n for n in config.roles().planes[0].tensors[0][1].names[:-1] if n in checkpoint), None
        )
        if embed is not None and not _equal(checkpoint, embed, "lm_head.weight"):
            warnings.append("config says tied embeddings, but the two matrices differ: kept apart")
            return replace(config, tied=False)
    return config


def _head_names(config: ModelConfig) -> tuple[str, ...]:
    """What an untied head may be called."""
    heads = [plane for plane in config.roles().planes if plane.name == "head"]
    return heads[0].tensors[0][1].names if heads else ()


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    if checkpoint.shape(a) != checkpoint.shape(b) or len(checkpoint.shape(a)) != 2:
        return False
    n_rows, n_cols = checkpoint.shape(a)
    step = max(1, _COMPARE_BYTES // (4 * max(1, n_cols)))
    return all(
        np.array_equal(
            checkpoint.rows(a, start, min(start + step, n_rows)),
            checkpoint.rows(b, start, min(start + step, n_rows)),
        )
        for start in range(0, n_rows, step)
    )


def _warn_of_unused(
    config: ModelConfig,
    checkpoint: Checkpoint,
    roles: Roles,
    used: set[str],
    warnings: list[str],
) -> None:
    known = {part[0] if (part := part_of(name)) else name for name in used}
    if config.tied:
        known.add("lm_head.weight")
    ignored = re.compile("|".join(roles.ignored)) if roles.ignored else None
    unused = [
        name
        for name in checkpoint.names()
        if name not in known and not (ignored and ignored.fullmatch(name))
    ]
    if unused:
        some = ", ".join(sorted(unused)[:5]) + (", ..." if len(unused) > 5 else "")
        warnings.append(f"{len(unused)} tensors of the checkpoint are not used: {some}")


def stored_types(
    resolved: Resolved, checkpoint: Checkpoint, role: PlaneRole
) -> dict[str, list[str]]:
    """Part or piece name -> the types its tensors are stored in."""
    types: dict[str, list[str]] = {}
    for name, tensor in role.tensors:
        types.setdefault(name, []).append(checkpoint.dtype(resolved.names[tensor]))
    return types
