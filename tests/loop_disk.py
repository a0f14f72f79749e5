"""A file system on a loop device whose backing file is ours to cut, change, copy and unplug.

Needs root, mkfs.ext4 and loop devices; `loop_disk` skips with the reason where they are missing.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from flashllm.units import MIB

BLOCK = 4096
FIBMAP, SHUTDOWN = 1, 0x8004587D  # _IO(0, 1); _IOR('X', 125, __u32) of ext4
NO_LOG_FLUSH = 2  # as if the power went: nothing that is only in memory reaches the disk


class LoopDisk:
    """A mounted ext4 on `image`; a context manager that unmounts."""

    def __init__(self, folder: Path, *, size: int = 32 * MIB, journal: bool = True):
        self.image, self.folder = folder / "image", folder / "mounted"
        with open(self.image, "wb") as file:
            file.truncate(size)
        self.folder.mkdir()
        features = () if journal else ("-O", "^has_journal")
        call("mkfs.ext4", "-q", "-b", str(BLOCK), *features, str(self.image))
        self.mount()

    def __enter__(self) -> LoopDisk:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # A broken file system cannot be written back whole: that is the point of it.
        subprocess.run(["umount", "-l", str(self.folder)], capture_output=True)

    def mount(self, *options: str) -> None:
        call("mount", "-o", ",".join(("loop", *options)), str(self.image), str(self.folder))

    def unmount(self) -> None:
        call("umount", str(self.folder))

    def pull_the_plug(self) -> None:
        """Nothing more is written, and what was not forced out is lost; then mounted again."""
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("<I", NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def device(self) -> str:
        """major:minor of the loop device."""
        number = os.stat(self.folder).st_dev
        return f"{os.major(number)}:{os.minor(number)}"

    def place(self, path: Path, offset: int) -> int:
        """Where in the image the byte at `offset` of a file lies."""
        with open(path, "rb") as file:
            block = ctypes.c_int(offset // BLOCK)
            fcntl.ioctl(file.fileno(), FIBMAP, block)
        assert block.value, "a hole"
        return block.value * BLOCK + offset % BLOCK

    def flip(self, path: Path, offset: int) -> None:
        """Flip a bit of the file on the device, behind the file system's back."""
        with open(self.image, "r+b") as file:
            file.seek(self.place(path, offset))
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))


def call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def loop_disk(folder: Path, **options) -> LoopDisk:
    """A LoopDisk, or a skip."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    for tool in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    try:
        return LoopDisk(folder, **options)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop device here: {error.stderr}")
