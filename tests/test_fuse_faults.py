"""A device that misbehaves at one place of the file, through the kernel's own paths (R-53, R-55).

The model lies on a FUSE file system of ours (fuse_server.py), which fails, shortens, changes or
holds back reads of one frame.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import threading
import time

import numpy as np
import pytest

from flashllm import LLM
from flashllm.conversion.enlarge import inflate
from flashllm.errors import ChecksumError, FlashReadError, UnsupportedError
from flashllm.storage import ReadBatch, open_storage
from flashllm.units import MIB

from .fuse_server import Fuse, Rule, why_not
from .patience import patience
from .readers import READERS, settings
from .tiny import GOLDEN

ASK = {"max_tokens": 4, "temperature": 2.0, "seed": 1, "ignore_eos": True}
UNIT = 16384
pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuse") / "m.flash"
    inflate(GOLDEN / "llama-relu", path, size_bytes=2 * MIB, min_layers=2)
    return path


@pytest.fixture(scope="module")
def fuse(plain):
    reason = why_not(plain.parent)
    if reason is not None:
        pytest.skip(reason)
    with Fuse(plain.parent / "mounted", plain) as server:
        yield server


@pytest.fixture(scope="module")
def expected(plain):
    with LLM(str(plain), ram_budget="1GiB") as llm:
        return llm.generate([1, 2, 3], **ASK).tokens


def opened(path, reader: str) -> LLM:
    return LLM(str(path), ram_budget="1GiB", pin=False, num_threads=1, **settings(reader, path))


def frame_rule(llm: LLM, kind: str, **more) -> Rule:
    """A rule for the first frame of a plane that every token needs whole; "old" answers with the
    frame of the layer before it, which has the same shape."""
    before, start = (int(llm.container.planes[f"layers.{i}.deciding"].offsets[0]) for i in (0, 1))
    if kind == "old":
        more["shift"] = before - start
    return Rule(kind, start, start + 1, **more)


# case -> (rule, what the request raises, its errno); None: the same tokens
CASES = {
    "fails once": ({"kind": "eio", "times": 1}, None, None),
    "fails always": ({"kind": "eio"}, FlashReadError, errno.EIO),
    "is wrong once": ({"kind": "wrong", "times": 1}, None, None),
    "is wrong always": ({"kind": "wrong"}, ChecksumError, None),
    "is another frame": ({"kind": "old"}, ChecksumError, None),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", CASES)
def test_one_place_misbehaves(fuse, expected, case, reader):
    rule, error, number = CASES[case]
    with opened(fuse.path, reader) as llm:
        fuse.rules(frame_rule(llm, **rule))
        try:
            if error is None:
                assert llm.generate([1, 2, 3], **ASK).tokens == expected
            else:
                with pytest.raises(error, match="plane") as raised:
                    llm.generate([1, 2, 3], **ASK)
                if number is not None:
                    assert raised.value.errno == number
            assert fuse.seen()["hits"] > 0
        finally:
            fuse.rules()
        assert llm.generate([1, 2, 3], **ASK).tokens == expected
        llm.store.check()


@pytest.mark.parametrize("reader", READERS)
def test_short_answers(fuse, expected, reader):
    """Read on from where they end, or a typed error with its place where the kernel takes them for
    the file's end; never other tokens."""
    with opened(fuse.path, reader) as llm:
        fuse.rules(frame_rule(llm, "short"))
        try:
            assert llm.generate([1, 2, 3], **ASK).tokens == expected
        except (FlashReadError, ChecksumError) as error:
            assert "plane layers." in str(error)
        finally:
            fuse.rules()
        assert llm.generate([1, 2, 3], **ASK).tokens == expected


@pytest.mark.parametrize("reader", READERS)
def test_a_file_system_that_goes_away(fuse, tmp_path, plain, expected, reader):
    """Unmounted, and nobody there to answer, under an open engine."""
    with Fuse(tmp_path / "gone", plain) as going, opened(going.path, reader) as llm:
        assert llm.generate([1, 2, 3], **ASK).tokens == expected
        going.close()
        with pytest.raises(FlashReadError):
            llm.generate([1, 2, 3], **ASK)


class Stalled(threading.Thread):
    """What the rest of the process sees while one read does not come back, then a Ctrl-C."""

    def __init__(self, fuse: Fuse, stuck: LLM, plain: str):
        super().__init__()
        self._fuse, self._stuck, self._plain = fuse, stuck, plain
        self.figures, self.other, self.sent = {}, [], 0.0
        self.bound = patience(3.0)  # 300 ms on an idle machine; test machines are shared
        self._raised = threading.Event()

    def run(self) -> None:
        try:
            self._fuse.wait_for_stall()
            self.figures = self._stuck.live()
            with opened(self._plain, "pread") as other:
                self.other = other.generate([1, 2, 3], **ASK).tokens
            self.sent = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)
            self._raised.wait(self.bound)
        finally:
            self._fuse.answer()

    def end(self) -> float:
        """Called when the interrupt has arrived; seconds since it was sent."""
        seconds = time.monotonic() - self.sent
        self._raised.set()
        self.join()
        return seconds


@pytest.mark.parametrize("reader", READERS)
def test_a_read_that_does_not_come_back(fuse, plain, expected, reader):
    """R-55: figures, other handles and Ctrl-C work meanwhile; afterwards the handle does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with opened(fuse.path, reader) as llm:
            fuse.rules(frame_rule(llm, "stall", times=1))
            meanwhile = Stalled(fuse, llm, str(plain))
            meanwhile.start()
            with pytest.raises(KeyboardInterrupt):
                llm.generate([1, 2, 3], **ASK)
            assert meanwhile.end() < meanwhile.bound
            assert meanwhile.other == expected and meanwhile.figures["rss"] > 0
            assert llm.generate([1, 2, 3], **ASK).tokens == expected
            llm.store.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_read_that_does_not_come_back_holds_up_no_others(fuse, plain):
    """Of a batch behind it every extent arrives, more of them than are read at once.  In a ring
    none would, as FUSE waits when a read is handed over (docs/READING.md)."""
    n = 40
    offsets = np.arange(n + 1) * UNIT
    try:
        storage = open_storage("direct", fuse.path, depth=4)
    except UnsupportedError as error:
        pytest.skip(str(error))
    with storage:
        memory = np.frombuffer(mmap.mmap(-1, (n + 1) * UNIT), np.uint8)
        addresses = memory.ctypes.data + offsets
        fuse.rules(Rule("stall", 0, 1, times=1))
        try:
            stuck = storage.submit(ReadBatch.plain(offsets[:1], [UNIT], addresses[:1]))
            fuse.wait_for_stall()
            others = storage.submit(ReadBatch.plain(offsets[1:], np.full(n, UNIT), addresses[1:]))
            until = time.monotonic() + patience(10)
            while others.done() < n and time.monotonic() < until:
                os.sched_yield()
            assert (stuck.done(), others.done()) == (0, n)
        finally:
            fuse.answer()
            fuse.rules()
        stuck.wait()
    assert (memory == np.fromfile(plain, np.uint8, (n + 1) * UNIT)).all()
