"""Interrupted, refused, short and failing calls, made by a shim in front of the C library.

The shim is compiled on the spot and loaded into a child before everything else.  After arm("plan")
each preadv takes the next letter: s returns at most 1536 bytes, i EINTR, a EAGAIN, e EIO, x ENXIO,
z nothing (end of file), b blocks for a minute, h holds until let_go(), . is the real call; the last
letter goes on forever.  `order` has where the armed calls read, `held` says that one is held.
A ring of io_uring makes no such calls, so that threads read here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from .patience import patience

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char plan[256];
static volatile int at;
atomic_int held, free_to_go, n_calls;
long long order[64];

void let_go(void) { free_to_go = 1; }

void arm(const char *letters) { strncpy(plan, letters, sizeof plan - 1); at = 0; }

ssize_t preadv64(int fd, const struct iovec *iov, int n, off64_t offset)
{
    ssize_t (*real)(int, const struct iovec *, int, off64_t) = dlsym(RTLD_NEXT, "preadv64");
    const char letter = plan[0] ? plan[at] : '.';
    if (plan[0] && plan[at + 1])
        at++;
    if (plan[0] && n_calls < 64)
        order[n_calls++] = offset;
    switch (letter) {
    case 'i': errno = EINTR; return -1;
    case 'a': errno = EAGAIN; return -1;
    case 'e': errno = EIO; return -1;
    case 'x': errno = ENXIO; return -1;
    case 'z': return 0;
    case 'b': sleep(60); return real(fd, iov, n, offset);
    case 'h':
        for (held = 1; !free_to_go;)
            usleep(100);
        break;
    case 's': {
        struct iovec part[1024];
        size_t left = 1536;
        int k = 0;
        for (; k < n && left; k++) {
            part[k] = iov[k];
            if (part[k].iov_len > left)
                part[k].iov_len = left;
            left -= part[k].iov_len;
        }
        return real(fd, part, k, offset);
    }
    }
    return real(fd, iov, n, offset);
}
"""

CHILD = """
import ctypes, mmap, os, signal, sys, time
import numpy as np
from flashllm.errors import FlashReadError
from flashllm.storage import ReadBatch, open_storage

backend, path, plan = sys.argv[1:]
content = np.random.default_rng(1).integers(0, 256, 40960, np.uint8)
with open(path, "wb") as file:
    file.write(content.tobytes())
storage = open_storage(backend, path, depth=1, engine="threads")
arm = ctypes.CDLL(None).arm
memory = np.frombuffer(mmap.mmap(-1, 40960), np.uint8)
spots = np.random.default_rng(2).permutation(80) * 512
none = np.empty(0, np.uint64)
batch = ReadBatch(
    np.array([0, 20480]), np.array([20480, 20480]), np.array([0, 40, 80], np.int32),
    (memory.ctypes.data + spots).astype(np.uint64), np.full(80, 512), np.zeros(3, np.int32),
    none, none.astype(np.int64), none, none,
)
arm(plan.encode())
ticket = storage.submit(batch)
"""

OUTCOME = """
try:
    ticket.wait()
    whole = (memory.reshape(80, 512)[spots // 512].reshape(-1) == content).all()
    print("whole" if whole else "wrong", storage.stats()["n_retries"])
except FlashReadError as error:
    print("error", error.errno, error.offset, ticket.done(), storage.stats()["n_retries"])
"""


ORDER = """
library = ctypes.CDLL(None)

def submit(*numbers, ahead=False):
    at = 512 * np.array(numbers)
    batch = ReadBatch.plain(at, np.full(len(at), 512), at + memory.ctypes.data)
    return storage.submit(batch, ahead=ahead)

while not ctypes.c_int.in_dll(library, "held").value:
    pass
tickets = [ticket, submit(1, 2, ahead=True), submit(3, 4), submit(5, ahead=True), submit(6)]
for closed in CLOSED:
    tickets.pop(closed).close()
tickets += [submit(7, ahead=True), submit(8)]
library.let_go()
for ticket in tickets:
    ticket.wait()
n = ctypes.c_int.in_dll(library, "n_calls").value
print(*[at // 512 for at in (ctypes.c_longlong * 64).in_dll(library, "order")[:n]])
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler")
    if sys.platform != "linux":
        pytest.skip("the shim replaces a symbol of glibc")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    library = folder / "shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, folder / "shim.c", "-ldl"], check=True
    )
    return library


def run(shim, tmp_path, plan, code, *, backend="pread"):
    return subprocess.run(
        [sys.executable, "-c", CHILD + code, backend, str(tmp_path / "file"), plan],
        env={"LD_PRELOAD": str(shim), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=patience(120),
    )


# plan -> what is printed: errno 4 EINTR, 5 EIO, 6 ENXIO, 11 EAGAIN, 61 ENODATA
PLANS = {
    ".": "whole 0",
    "s": "whole 0",
    "sisaes.": "whole 3",
    "s.": "whole 0",
    "e.": "whole 1",
    "e.e.": "whole 2",
    "ee.": "error 5 0 0 1",
    "see.": "error 5 1536 0 1",
    ".ee.": "error 5 20480 1 1",
    "x.": "error 6 0 0 0",
    "i" * 64 + ".": "whole 64",
    "i" * 65 + ".": "error 4 0 0 64",
    "a" * 20 + ".": "whole 20",
    "sz.": "error 61 1536 0 0",
    ".sz.": "error 61 22016 1 0",
}


@pytest.mark.parametrize("plan", PLANS)
def test_what_becomes_of_a_troubled_call(shim, tmp_path, plan):
    result = run(shim, tmp_path, plan, OUTCOME)
    assert result.stdout.strip() == PLANS[plan], result.stderr


@pytest.mark.parametrize("plan", ["s", "sisaes.", "see.", "sz."])
def test_the_same_past_the_page_cache(shim, tmp_path, plan):
    result = run(shim, tmp_path, plan, OUTCOME, backend="direct")
    if "UnsupportedError" in result.stderr or "off the alignment" in result.stderr:
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.stdout.strip() == PLANS[plan], result.stderr


def test_a_signal_interrupts_a_wait(shim, tmp_path):
    """The device hangs; the handler's exception comes out of wait() all the same."""
    code = """
def ring(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, ring)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    ticket.wait()
except KeyboardInterrupt:
    print("interrupted", flush=True)
os._exit(0)
"""
    result = run(shim, tmp_path, "b", code)
    assert result.stdout.strip() == "interrupted", result.stderr


# which of the tickets are closed before anything of them is read -> the order of the reads; 0 and
# 40 are those of the first ticket, of which the first is in flight meanwhile
ORDERS = {
    (): "0 40 3 4 6 8 1 2 5 7",
    (4,): "0 40 3 4 8 1 2 5 7",
    (3,): "0 40 3 4 6 8 1 2 7",
    (4, 2): "0 40 8 1 2 5 7",
    (3, 1): "0 40 3 4 6 8 7",
    (4, 3, 2, 1): "0 40 8 7",
}


@pytest.mark.parametrize("closed", ORDERS)
def test_what_is_wanted_passes_what_is_read_ahead(shim, tmp_path, closed):
    result = run(shim, tmp_path, "h.", ORDER.replace("CLOSED", str(closed)))
    assert result.stdout.strip() == ORDERS[closed], result.stderr
