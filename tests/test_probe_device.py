"""The probe reads the very file, within its bounds, and the choice gives its reason."""

from __future__ import annotations

import errno
import time

import numpy as np
import pytest

from flashllm.errors import FlashReadError, FormatError, UnsupportedError
from flashllm.probe import device
from flashllm.probe.curve import DEFAULT_CURVE
from flashllm.storage import STORAGES, open_storage
from flashllm.storage.wrappers import SlowStorage
from flashllm.units import KIB, MIB


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("device") / "file.bin"
    path.write_bytes(np.random.default_rng(0).bytes(6 * MIB))
    return path


@pytest.mark.parametrize("name", STORAGES.names())
def test_probe_measures_what_the_file_has_room_for(path, name):
    try:
        curve = device.probe_device(path, name)
    except UnsupportedError as error:
        pytest.skip(str(error))
    measured = {(p.depth, p.size_bytes) for p in curve.points}
    # 6 MiB: six places of 1 MiB, 24 of 256 KiB; a depth needs twice as many.
    assert (1, 4 * KIB) in measured and (16, 4 * KIB) in measured
    assert not measured & {(16, 256 * KIB), (16, MIB)}
    assert name in curve.name


def test_probe_is_bounded_on_a_slow_device(path, monkeypatch):
    """At 1 MB/s and 10 ms a read, reading every point would take 50 s."""
    now = [0.0]

    def pass_time(seconds):
        now[0] += seconds

    def slow(name, path, *, depth, engine):
        inner = open_storage(name, path, depth=depth, engine=engine)
        price = dict(seconds_per_read=0.01, bytes_per_s=1e6)
        return SlowStorage(inner, **price, clock=lambda: now[0], sleep=pass_time)

    monkeypatch.setattr(device, "open_storage", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    curve = device.probe_device(path, "pread", seconds=0.3)
    assert 0.1 < now[0] < 1.0
    assert curve.points[0].seconds_per_read == pytest.approx(0.01 + 4096 / 1e6, rel=0.01)


def test_a_file_too_small_to_probe(tmp_path):
    for size in (0, 100, 5000):
        path = tmp_path / f"small{size}"
        path.write_bytes(bytes(size))
        assert device.probe_device(path, "pread") is DEFAULT_CURVE
        choice = device.choose_storage(path)
        assert choice.curve is DEFAULT_CURVE and "too small" in choice.why


def test_direct_is_chosen_where_it_works(path):
    try:
        open_storage("direct", path).close()
    except UnsupportedError as error:
        pytest.skip(str(error))
    choice = device.choose_storage(path)
    assert choice.name == "direct" and "O_DIRECT works" in choice.why
    assert device.choose_storage(path, curve=DEFAULT_CURVE).curve is DEFAULT_CURVE


def test_a_file_system_without_direct():
    choice = device.choose_storage("/proc/version")
    assert choice.name in ("pread", "mmap") and "refuses O_DIRECT" in choice.why
    given = device.choose_storage("/proc/version", curve=DEFAULT_CURVE)
    assert (given.name, given.curve) == ("pread", DEFAULT_CURVE) and "not probed" in given.why


def test_direct_that_fills_the_page_cache_is_found_out(path, monkeypatch):
    """A file system that takes the flag and reads through the cache all the same."""
    real = open_storage

    def pretend(name, path, *, depth=16, engine="threads"):
        return real("pread", path, depth=depth, engine=engine)

    resident = iter([0, 4096])
    monkeypatch.setattr(device, "open_storage", pretend)
    monkeypatch.setattr(device, "resident_bytes", lambda fd, offset, length: next(resident))
    choice = device.choose_storage(path)
    assert choice.name in ("pread", "mmap") and "fills the page cache" in choice.why
    assert "pread" in choice.why and "mmap" in choice.why


def test_what_cannot_be_read_is_not_chosen_for(tmp_path):
    with pytest.raises(FlashReadError) as raised:
        device.choose_storage(tmp_path / "none")
    assert raised.value.errno == errno.ENOENT
    with pytest.raises(FormatError):
        device.choose_storage(tmp_path)
