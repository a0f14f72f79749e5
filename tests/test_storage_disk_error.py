"""A disk that fails under a file, through the kernel's own error path.

A loop device whose backing file is cut short answers EIO beyond the cut.  Needs root and loop
devices.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess

import numpy as np
import pytest

from flashllm.errors import FlashReadError, UnsupportedError
from flashllm.storage import STORAGES, ReadBatch, open_storage
from flashllm.units import MIB

UNIT = 65536
pytestmark = pytest.mark.kernel


def call(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A file whose second half cannot be read any more."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    for tool in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    folder = tmp_path_factory.mktemp("disk")
    image, mounted = folder / "image", folder / "mounted"
    with open(image, "wb") as file:
        file.truncate(32 * MIB)
    mounted.mkdir()
    try:
        call("mkfs.ext4", "-q", "-O", "^has_journal", str(image))
        call("mount", "-o", "loop", str(image), str(mounted))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop device here: {error.stderr}")
    try:
        path = mounted / "content"
        path.write_bytes(np.random.default_rng(0).bytes(20 * MIB))
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.sync()
        os.truncate(image, 12 * MIB)
        yield path
    finally:
        # The file system cannot be written back whole: that is the point of it.
        subprocess.run(["umount", "-l", str(mounted)], check=True)


@pytest.mark.parametrize("name", STORAGES.names())
def test_a_failing_disk_is_a_typed_error_with_its_place(failing, name):
    try:
        storage = open_storage(name, failing)
    except UnsupportedError as error:
        pytest.skip(str(error))
    with storage:
        n = storage.size // UNIT
        memory = np.empty(UNIT + 4096, np.uint8)
        address = -(-memory.ctypes.data // 4096) * 4096
        offsets = np.arange(n) * UNIT
        batch = ReadBatch.plain(offsets, np.full(n, UNIT), np.full(n, address))
        with storage.submit(batch, lambda extent, check: f"frame {extent}") as ticket:
            with pytest.raises(FlashReadError, match="frame") as raised:
                ticket.wait()
            done = ticket.done()
        assert raised.value.errno == errno.EIO and raised.value.where == f"frame {done}"
        assert done * UNIT <= raised.value.offset < (done + 1) * UNIT
        assert storage.stats()["n_retries"] > 0 or name == "mmap"
        with pytest.raises(FlashReadError) as again:
            storage.read(done * UNIT, UNIT)
        assert again.value.errno == errno.EIO
