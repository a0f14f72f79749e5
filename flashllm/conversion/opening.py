"""Any source of a conversion: a checkpoint of some kind, or a container made earlier."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoints import Checkpoint, open_checkpoint
from ..container.header import MAGIC
from .from_container import ContainerCheckpoint


def open_source(path: str | os.PathLike) -> Checkpoint:
    """The checkpoint or container at `path`, told by its content; errors as theirs."""
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return ContainerCheckpoint(path)
    return open_checkpoint(path)
