"""A disk that fails under a file, through the kernel's own error path.

A loop device whose backing file is cut short answers EIO beyond the cut.  Needs root and loop
devices.
"""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from flashllm.errors import FlashReadError
from flashllm.storage import ReadBatch
from flashllm.stress.confine import make_cold
from flashllm.units import MIB

from .loop_disk import loop_disk
from .readers import READERS, opened

UNIT = 65536
pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A file whose second half cannot be read any more."""
    with loop_disk(tmp_path_factory.mktemp("disk"), journal=False) as disk:
        path = disk.folder / "content"
        path.write_bytes(np.random.default_rng(0).bytes(20 * MIB))
        make_cold(path)
        os.sync()
        os.truncate(disk.image, 12 * MIB)
        yield path


@pytest.mark.parametrize("name", READERS)
def test_a_failing_disk_is_a_typed_error_with_its_place(failing, name):
    with opened(name, failing) as storage:
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
