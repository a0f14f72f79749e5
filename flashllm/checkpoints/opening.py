"""Which kind of checkpoint lies at a path: told by its first bytes, never by its suffix."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from ..errors import CheckpointError, UnsupportedError
from .base import Checkpoint
from .files import SourceFile
from .llama2c import MAGIC_V1, Llama2cCheckpoint
from .rwkv_cpp import MAGIC as MAGIC_RWKV_CPP
from .rwkv_cpp import RWKVCppCheckpoint
from .rwkv_safetensors import RWKVSafetensors, is_rwkv
from .safetensors import INDEX_NAME, MAX_HEADER_BYTES, SafetensorsCheckpoint, read_index
from .torch_file import TorchCheckpoint

# First bytes of kinds we know by name and do not read.
_UNSUPPORTED = {
    b"GGUF": "GGUF",
    struct.pack("<i", 0x67676D6C): "legacy ggml",
    b"\x80\x02": "a pickle (pickles are never read)",
    b"\x80\x03": "a pickle (pickles are never read)",
    b"\x80\x04": "a pickle (pickles are never read)",
    b"\x80\x05": "a pickle (pickles are never read)",
    b"\x89FLASH\r\n": "a flashllm container",
}


def sniff(path: Path) -> str:
    """The kind of a regular file's content; UnsupportedError names one that is known, not read."""
    file = SourceFile(path)
    try:
        head = bytes(file.read(0, min(16, file.size)))
    finally:
        file.close()
    for magic, name in _UNSUPPORTED.items():
        if head.startswith(magic):
            raise UnsupportedError(f"{path}: {name} is not supported as a source")
    if head.startswith(b"PK\x03\x04"):
        return "PyTorch"
    if head.lstrip()[:1] == b"{":
        return "json"
    if head.startswith(MAGIC_RWKV_CPP):
        return "rwkv.cpp"
    if head.startswith(MAGIC_V1):
        return "llama2.c"
    if len(head) > 8 and head[8:9] == b"{":
        return "safetensors"
    if len(head) > 8 and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER_BYTES:
        return "safetensors"  # a damaged one: let its reader say what is wrong
    if len(head) == 16 and all(0 < abs(n) < 2**24 for n in struct.unpack("<4i", head)):
        return "llama2.c"  # version 0 has no magic: its reader compares the size
    raise CheckpointError(path, "first bytes", "a known header", head[:9].hex() or "nothing")


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """The checkpoint at `path`: a Hugging Face directory, its index, or one of its files.

    CheckpointError for what is missing or malformed; UnsupportedError for kinds known by name.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    kind = sniff(path)
    if kind == "llama2.c":
        return Llama2cCheckpoint(path)
    if kind == "rwkv.cpp":
        return RWKVCppCheckpoint(path)
    if kind == "PyTorch":
        return _open_torch(path)
    if kind == "json":
        if path.name == INDEX_NAME:
            return _open_sharded(path, path)
        return _open_folder(path.parent)
    return _of_any_layout(SafetensorsCheckpoint(path, path.parent, [path], None))


def _open_folder(folder: Path) -> Checkpoint:
    if os.path.lexists(folder / INDEX_NAME):
        return _open_sharded(folder, folder / INDEX_NAME)
    if os.path.lexists(folder / "model.safetensors"):
        found = [folder / "model.safetensors"]
    else:
        found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(folder, "safetensors files", f"one, or {INDEX_NAME}", names)
    if not found:
        for other in sorted(folder.iterdir()):
            known = other.suffix in (".bin", ".pth", ".pt", ".gguf") and other.is_file()
            if known and sniff(other) == "PyTorch":  # which names kinds that are not read at all
                raise UnsupportedError(
                    f"{other}: a PyTorch file in a directory is not read; an RWKV model's may be "
                    "named itself"
                )
        raise CheckpointError(folder, "directory", "a safetensors file", "none")
    kind = sniff(found[0])
    if kind != "safetensors":
        raise CheckpointError(found[0], "content", "safetensors, as its name says", kind)
    return _of_any_layout(SafetensorsCheckpoint(folder, folder, found, None))


def _open_sharded(path: Path, index_path: Path) -> Checkpoint:
    index = read_index(index_path)
    folder = index_path.parent
    shards = [folder / name for name in sorted(set(index.values()))]
    return _of_any_layout(SafetensorsCheckpoint(path, folder, shards, index))


def _open_torch(path: Path) -> Checkpoint:
    checkpoint = TorchCheckpoint(path)
    if is_rwkv(checkpoint.names()):
        return RWKVSafetensors(checkpoint)
    checkpoint.close()
    raise UnsupportedError(
        f"{path}: of PyTorch files only RWKV's are read, whose tensors say all there is to know; "
        "save other models as safetensors"
    )


def _of_any_layout(checkpoint: SafetensorsCheckpoint) -> Checkpoint:
    """Families whose files have names of their own come in the names our roles use."""
    if is_rwkv(checkpoint.names()):
        return RWKVSafetensors(checkpoint)
    with checkpoint.closed_on_error():
        checkpoint.require_config()
    return checkpoint
