"""Faults: a typed error that names the frame, then a store that serves the next request."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from flashllm.cache import Segment
from flashllm.codecs.zstd import ZstdDecoder
from flashllm.errors import ChecksumError, CodecError, FlashReadError, UnsupportedError
from flashllm.offload.taking import Taker
from flashllm.storage.base import Storage, Ticket
from flashllm.storage.wrappers import FaultyStorage, SlowStorage

from .offload_model import (
    ORDER,
    SPARSE,
    Model,
    active,
    item_bytes,
    read_ids,
    read_scan,
    run_step,
)
from .patience import patience


class Fault:
    """Breaks the n-th extent from `arm` on."""

    def __init__(self):
        self.left, self.kind = -1, "fail"

    def arm(self, n: int, kind: str) -> None:
        self.left, self.kind = n, kind

    def __call__(self, ordinal: int, offset: int, length: int) -> str | None:
        self.left -= 1
        return self.kind if self.left == -1 else None


@pytest.mark.parametrize("mode", ["sweep", "cached"])
@pytest.mark.parametrize(
    "codec, kind", [("raw", "fail"), ("raw", "short"), ("raw", "corrupt"), ("zstd", "corrupt")]
)
def test_any_extent_may_fail(tmp_path, codec, mode, kind):
    fault = Fault()
    model = Model(tmp_path / "m.flash", codec, wrap=lambda inner: FaultyStorage(inner, fault))
    store = model.store(model.share(0.3), mode=mode)
    rng = np.random.default_rng(7)
    error_type = ChecksumError if kind == "corrupt" else FlashReadError
    n_errors = 0
    for n in range(40):
        fault.arm(n, kind)
        for _ in range(2):
            try:
                run_step(model, store, rng)
            except error_type as error:
                assert "plane " in str(error) and ", frame " in str(error)
                assert "(item" in str(error) and "m.flash" in str(error)
                n_errors += 1
                store.end_step()
            store.check()
        fault.arm(-1, kind)
        run_step(model, store, rng)
    assert n_errors > 15
    model.close()


@pytest.mark.parametrize("kind", FaultyStorage.KINDS)
def test_loading_may_fail_and_be_repeated(tmp_path, kind):
    fault = Fault()
    model = Model(tmp_path / "m.flash", wrap=lambda inner: FaultyStorage(inner, fault))
    fault.arm(5, kind)
    with pytest.raises((FlashReadError, ChecksumError), match="plane .*, frame "):
        model.store(model.share(0.5))
    store = model.stores[0]
    store.check()
    store.load()
    run_step(model, store, np.random.default_rng(1))
    model.close()


def test_a_failed_prefetch_is_dropped_and_counted(tmp_path):
    fault = Fault()
    model = Model(tmp_path / "m.flash", wrap=lambda inner: FaultyStorage(inner, fault))
    store = model.store({"layers.1.ffn": 40}, mode="cached")
    ids = np.arange(50, 60, dtype=np.int32)
    store.begin_step(("layers.1.ffn",), admit=True)
    fault.arm(0, "fail")
    store.prefetch("layers.1.ffn", ids)
    read_ids(model, store, "layers.1.ffn", ids)
    stats = store.end_step()
    assert stats.prefetch_dropped == 10 and stats.misses == 10
    model.close()


@pytest.mark.parametrize("fails", [False, True])
def test_units_that_advice_has_asked_for_come_second(tmp_path, fails):
    """What is in memory, what is on its way, the rest; advice that fails only changes the order."""
    fault, now, name = Fault(), [0.0], "layers.1.ffn"
    slow = {"seconds_per_read": 0.01, "clock": lambda: now[0],
            "sleep": lambda s: now.__setitem__(0, now[0] + s)}  # fmt: skip
    model = Model(
        tmp_path / "m.flash", wrap=lambda inner: FaultyStorage(SlowStorage(inner, **slow), fault)
    )
    store = model.store({name: 40}, mode="cached")
    store.begin_step((name,), admit=True)
    fault.arm(0 if fails else -1, "fail")
    store.prefetch(name, np.arange(70, 80, dtype=np.int32), beside=np.arange(10, dtype=np.int32))
    assert not store.absent(name, np.r_[0:10, 70:80]).any()
    seen = []
    for lease in store.acquire(name, np.r_[0:10, 50:60, 70:80].astype(np.int32), unit=10):
        for item in lease.ids.tolist():
            found = item_bytes(model.container.planes[name], lease.addresses, item)
            assert found == model.truth[name][item].tobytes(), item
        seen += lease.ids.tolist()
    stats = store.end_step()
    later = [*range(50, 60), *range(70, 80)] if fails else [*range(70, 80), *range(50, 60)]
    assert seen == [*range(10), *later] and stats.prefetch_dropped == 10 * fails
    model.close()


@pytest.mark.parametrize("mode", ["sweep", "cached"])
def test_a_frame_that_does_not_decode(tmp_path, monkeypatch, mode):
    model = Model(tmp_path / "m.flash", "zstd")
    store = model.store(model.share(0.3), mode=mode)
    rng = np.random.default_rng(7)
    decode, left = ZstdDecoder._decode_into, [-1]

    def broken(self, stored, out):
        left[0] -= 1
        if left[0] == -1:
            raise CodecError("stored frame", "zstd frame", "content", "nothing")
        decode(self, stored, out)

    monkeypatch.setattr(ZstdDecoder, "_decode_into", broken)
    n_errors = 0
    for n in range(40):
        left[0] = n
        for _ in range(2):
            try:
                run_step(model, store, rng)
            except CodecError as error:
                assert error.path.endswith("m.flash") and ", frame " in error.where
                n_errors += 1
                store.end_step()
            store.check()
    assert n_errors > 20
    model.close()


class Interrupting(Storage):
    """Ctrl-C in the n-th wait, while the reads go on."""

    def __init__(self, inner: Storage):
        self.inner, self.left = inner, -1
        for name in ("name", "path", "size", "alignment", "memory_alignment", "read", "stats",
                     "fileno", "close"):  # fmt: skip
            setattr(self, name, getattr(inner, name))

    name = path = size = alignment = memory_alignment = None
    read = stats = fileno = close = None

    def submit(self, batch, describe=None, *, ahead=False):
        return InterruptingTicket(self, self.inner.submit(batch, describe, ahead=ahead))


class InterruptingTicket(Ticket):
    def __init__(self, storage, inner):
        self.storage, self.inner = storage, inner
        self.done_once = False

    def wait(self, upto=None):
        self.storage.left -= 1
        if self.storage.left == -1:
            raise KeyboardInterrupt
        self.inner.wait(upto)

    def done(self):
        if not self.done_once:  # as if nothing were there yet, so that the caller waits
            self.done_once = True
            return 0
        return self.inner.done()

    def close(self):
        self.inner.close()


@pytest.mark.parametrize("mode", ["sweep", "cached"])
def test_interrupted_in_any_wait(tmp_path, mode):
    model = Model(tmp_path / "m.flash", wrap=Interrupting)
    store = model.store(model.share(0.3), mode=mode)
    rng = np.random.default_rng(7)
    n_interrupts = 0
    for n in range(25):
        model.storage.left = n
        try:
            run_step(model, store, rng)
        except KeyboardInterrupt:
            n_interrupts += 1
            store.end_step()
        store.check()
    assert n_interrupts > 12
    model.close()


@pytest.mark.parametrize("mode", ["sweep", "cached"])
def test_an_exception_in_the_model(tmp_path, mode):
    """Thrown into the loop that holds a lease, with the traceback keeping everything alive."""
    model = Model(tmp_path / "m.flash")
    store = model.store(model.share(0.3), mode=mode)
    rng = np.random.default_rng(7)
    kept = []
    for name in ORDER:
        store.begin_step(ORDER, admit=True, next_order=ORDER)
        try:
            ids = active(rng, len(model.truth[name]), 0.5)
            for lease in store.acquire(name, ids) if name in SPARSE else store.scan(name):
                raise RuntimeError(f"in {lease}")
        except RuntimeError as error:
            kept.append(error)
        finally:
            store.end_step()
        store.check()
    assert len(kept) == len(ORDER)
    run_step(model, store, rng)
    model.close()


def test_interrupted_between_pin_and_lease(tmp_path, monkeypatch):
    """The worst place: slots are placed and pinned and nobody owns them yet."""
    model = Model(tmp_path / "m.flash")
    store = model.store(model.share(0.3), mode="cached", policy="lru")
    rng = np.random.default_rng(7)
    place = Segment.place

    def interrupted(self, frames):
        place(self, frames)
        raise KeyboardInterrupt

    monkeypatch.setattr(Segment, "place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_step(model, store, rng)
    monkeypatch.undo()
    store.end_step()
    store.check()
    run_step(model, store, rng)
    model.close()


def test_interrupted_after_a_native_request(tmp_path):
    """The same where not even the number of used slots is known yet."""
    model = Model(tmp_path / "m.flash")
    store = model.store(model.share(0.3), mode="cached")
    rng = np.random.default_rng(7)
    state = next(state for state in store._states.values() if state.tables is not None)
    tables = state.tables

    def interrupted(*args):
        tables.take(*args)
        raise KeyboardInterrupt

    state.tables = SimpleNamespace(take=interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_step(model, store, rng)
    state.tables = tables
    store.end_step()
    store.check()
    run_step(model, store, rng)
    model.close()


def test_a_lost_pin_is_noticed(tmp_path, monkeypatch):
    """The checks can fail: a request that forgets to unpin is found at the end of its step."""
    model = Model(tmp_path / "m.flash")
    store = model.store(model.share(0.3), mode="cached")
    monkeypatch.setattr(Taker, "end", lambda self, state, taken: None)
    with pytest.raises(AssertionError, match=r"segment layers\.0\.ffn: idle with \d+ pinned"):
        run_step(model, store, np.random.default_rng(1))
    model.close()


def test_a_slow_device_is_waited_for(tmp_path):
    """On an injected clock: the time a step stands still is what the device needs."""
    now = [0.0]
    model = Model(
        tmp_path / "m.flash",
        wrap=lambda inner: SlowStorage(
            inner, seconds_per_read=0.01, bytes_per_s=1e6, clock=lambda: now[0],
            sleep=lambda s: now.__setitem__(0, now[0] + s),
        ),
    )  # fmt: skip
    store = model.store(mode="sweep")
    start = now[0]
    stats = run_step(model, store, np.random.default_rng(1), next_order=None)
    expected = stats.reads * 0.01 + stats.bytes_read / 1e6
    assert now[0] - start == pytest.approx(expected, rel=1e-6)
    model.close()


@pytest.mark.parametrize("codec", ["raw", "planes"])
@pytest.mark.parametrize("reader", ["direct", "ring", "mmap"])
def test_other_readers(tmp_path, reader, codec):
    model = Model(tmp_path / "m.flash", codec, reader=reader)
    if 512 % model.storage.alignment:
        pytest.skip(f"alignment {model.storage.alignment} here")
    for mode in ("sweep", "cached"):
        store = model.store(model.share(0.3), mode=mode)
        rng = np.random.default_rng(7)
        for _ in range(3):
            run_step(model, store, rng)
    model.close()


def test_a_backend_that_needs_more_alignment_is_refused(tmp_path):
    model = Model(tmp_path / "m.flash")
    model.storage.alignment = 4096
    with pytest.raises(UnsupportedError, match="aligned to 512 bytes, the 'pread' backend"):
        model.store()
    model.storage.alignment = 1
    model.close()


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_exit_with_everything_open(tmp_path, codec):
    """Threads alive, reads in flight, a lease out, nothing closed: exit code 0 and no words."""
    code = f"""
        from tests.offload_model import ORDER, Model
        model = Model({str(tmp_path / "m.flash")!r}, {codec!r})
        store = model.store(model.share(0.2))
        store.begin_step(ORDER, admit=True, next_order=ORDER)
        leases = store.scan("layers.0.qkv")
        lease = next(leases)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True,
        timeout=patience(120),
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_fork_with_a_lease_out(tmp_path, codec):
    """A child can close what it inherited and exit; the parent goes on."""
    model = Model(tmp_path / "m.flash", codec)
    store = model.store(model.share(0.2))
    store.begin_step(ORDER, admit=True, next_order=ORDER)
    leases = store.scan("layers.0.qkv")
    next(leases)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    store.end_step()
    run_step(model, store, np.random.default_rng(1))
    model.close()


def test_scans_go_on_beside_a_failed_read_ahead(tmp_path):
    """A read ahead that fails belongs to the plane that wanted it, not to the one before."""
    fault = Fault()
    model = Model(tmp_path / "m.flash", wrap=lambda inner: FaultyStorage(inner, fault))
    store = model.store(ring_stages=50, mode="sweep")
    order = ("layers.0.qkv", "layers.2.ffn")
    n_first = len(store._state(order[0]).sweep())
    fault.arm(n_first, "fail")
    store.begin_step(order, admit=True)
    read_scan(model, store, order[0])
    with pytest.raises(FlashReadError, match="plane layers.2.ffn, frame 0"):
        read_scan(model, store, order[1])
    store.end_step()
    store.begin_step(order, admit=True)
    for name in order:
        read_scan(model, store, name)
    store.end_step()
    model.close()
