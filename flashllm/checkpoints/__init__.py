"""Source checkpoints, read lazily and suspiciously (contract in base.py)."""

from ..registry import Registry
from .base import STORAGE_DTYPES, Checkpoint, part_of, widen
from .llama2c import Llama2cCheckpoint
from .opening import open_checkpoint
from .rwkv_cpp import RWKVCppCheckpoint
from .safetensors import SafetensorsCheckpoint

CHECKPOINTS: Registry[type[Checkpoint]] = Registry(
    "checkpoint kind",
    {kind.kind: kind for kind in (SafetensorsCheckpoint, Llama2cCheckpoint, RWKVCppCheckpoint)},
)

__all__ = ["CHECKPOINTS", "STORAGE_DTYPES", "Checkpoint", "open_checkpoint", "part_of", "widen"]
