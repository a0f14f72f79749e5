"""A file system of one file, served from the kernel's FUSE device without libfuse, that misbehaves
on request: the n-th read of a range fails, is cut short, answers other bytes or does not answer.

`Fuse(folder, content)` runs the server in a process of its own (this module as a script), because a
reader that waits for a server in its own interpreter can wait for ever.  Needs root and /dev/fuse.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

NAME = "model.flash"
NO_MOUNT = 100  # and errno: how the server ends where it may not mount
# Opcodes and their answers, from the kernel's public header linux/fuse.h, protocol 7.31.
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH = 1, 2, 3, 14, 15, 17, 18, 25
INIT, OPENDIR, READDIR, RELEASEDIR, ACCESS, INTERRUPT, DESTROY = 26, 27, 28, 29, 34, 36, 38
BATCH_FORGET = 42
SILENT = (FORGET, BATCH_FORGET, INTERRUPT)  # the kernel wants no answer
IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
MAX_READ = 128 * 1024
NAME_VALID_S = 3600
ATTRIBUTES_VALID_S = 0  # a short answer makes the kernel believe in a shorter file until it asks
MS_NOSUID_NODEV, MNT_DETACH = 2 | 4, 2


@dataclass(frozen=True)
class Rule:
    """What becomes of reads that touch [start, stop), the first `times` of them.

    `kind`: "eio"; "short" (half of what was asked for); "wrong" (every byte inverted); "old" (the
    bytes `shift` further on: valid once, elsewhere); "stall" (no answer until `Fuse.answer`).
    """

    kind: str
    start: int = 0
    stop: int = 1 << 62
    times: int = 1 << 62
    shift: int = 0


class Fuse:
    """A mounted server; a context manager.  `path` is the file that it serves."""

    def __init__(self, folder: Path, content: Path):
        folder.mkdir()
        self.folder, self.path = folder, folder / NAME
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(folder), str(content)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self._server.stdout.readline() != "mounted\n":
            code = self._server.wait()
            if code <= NO_MOUNT:
                raise RuntimeError(f"the FUSE server ended with {code}")
            raise OSError(code - NO_MOUNT, "the FUSE server could not mount")

    def __enter__(self) -> Fuse:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def ask(self, **command) -> dict:
        print(json.dumps(command), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def rules(self, *rules: Rule) -> None:
        """These rules from now on, instead of those before."""
        self.ask(rules=[vars(rule) for rule in rules])

    def seen(self) -> dict:
        """{"reads": reads served, "hits": reads that a rule changed, "stalled": now}."""
        return self.ask()

    def wait_for_stall(self, seconds: float = 20.0) -> None:
        """Return when a read is held back; TimeoutError when none comes."""
        until = time.monotonic() + seconds
        while not self.seen()["stalled"]:
            if time.monotonic() > until:
                raise TimeoutError("no read met the rule")
            os.sched_yield()

    def answer(self) -> None:
        """Answer what is held back, truthfully, and hold back nothing from now on."""
        self.ask(rules=[], answer=True)

    def close(self) -> None:
        """Unmount and end the server; reads that it still holds back fail.  Safe to call twice."""
        if self._server.poll() is not None:
            return
        libc().umount2(str(self.folder).encode(), MNT_DETACH)
        self._server.stdin.close()
        from .patience import patience  # here: the server runs as a script, outside the package

        self._server.wait(patience(30))
        self._server.stdout.close()


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def why_not(folder: Path) -> str | None:
    """None where this works, else the reason."""
    if os.geteuid() != 0:
        return "mounting needs root"
    if not os.path.exists("/dev/fuse"):
        return "no /dev/fuse"
    content = folder / "probe"
    content.write_bytes(b"x")
    try:
        with Fuse(folder / "probe-mount", content) as fuse:
            return None if fuse.path.read_bytes() == b"x" else "the FUSE server does not serve"
    except OSError as error:
        return str(error)


# ------------------------------------------------------------------------------------ the server


class Server:
    def __init__(self, fd: int, content: bytes):
        self._fd, self._content = fd, content
        self._rules: list[Rule] = []
        self._left: list[int] = []
        self._held: list[tuple[int, int, int]] = []
        self._reads = self._hits = 0
        self.ended = False

    def command(self, line: str) -> dict:
        asked = json.loads(line)
        if "rules" in asked:
            self._rules = [Rule(**rule) for rule in asked["rules"]]
            self._left = [rule.times for rule in self._rules]
        if asked.get("answer"):
            for unique, offset, size in self._held:
                self._answer(unique, self._content[offset : offset + size])
            self._held.clear()
        return {"reads": self._reads, "hits": self._hits, "stalled": len(self._held)}

    def serve_one(self) -> None:
        try:
            message = os.read(self._fd, MAX_READ + 4096)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                self.ended = True
                return
            if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # the asker gave up
                return
            raise
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(message)
        body = message[IN_HEADER.size :]
        if opcode == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            self._read(unique, offset, size)
        elif opcode == INIT:
            major, minor, ahead, _ = struct.unpack_from("<IIII", body)
            limits = struct.pack("<HHIIHHI", 16, 12, 4096, 1, MAX_READ // 4096, 0, 0)
            flags = 1 << 22  # FUSE_MAX_PAGES
            answer = struct.pack("<IIII", 7, 31, min(ahead, MAX_READ), flags) + limits + bytes(28)
            self._answer(unique, answer)
        elif opcode == LOOKUP:
            known = body.rstrip(b"\0") == NAME.encode()
            times = struct.pack("<QQQQII", 2, 0, NAME_VALID_S, ATTRIBUTES_VALID_S, 0, 0)
            self._answer(unique, times + self._attributes(2) if known else errno.ENOENT)
        elif opcode == GETATTR:
            valid = struct.pack("<QII", ATTRIBUTES_VALID_S, 0, 0)
            self._answer(unique, valid + self._attributes(node))
        elif opcode in (OPEN, OPENDIR):
            self._answer(unique, struct.pack("<QII", 0, 0, 0))
        elif opcode in (RELEASE, RELEASEDIR, FLUSH, ACCESS, READDIR, DESTROY):
            self._answer(unique, b"")
        elif opcode == STATFS:
            self._answer(unique, struct.pack("<QQQQQIIII", 0, 0, 0, 1, 0, 4096, 255, 4096, 0)
                         + bytes(24))  # fmt: skip
        elif opcode not in SILENT:
            self._answer(unique, errno.ENOSYS)

    def _attributes(self, node: int) -> bytes:
        mode, size = (0o40555, 0) if node == 1 else (0o100444, len(self._content))
        return ATTR.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _answer(self, unique: int, answer: bytes | int) -> None:
        """Bytes, or an errno."""
        error, data = (-answer, b"") if isinstance(answer, int) else (0, answer)
        try:
            os.write(self._fd, OUT_HEADER.pack(OUT_HEADER.size + len(data), error, unique) + data)
        except OSError as failed:
            if failed.errno not in (errno.ENOENT, errno.ENODEV):  # the asker is gone
                raise

    def _read(self, unique: int, offset: int, size: int) -> None:
        self._reads += 1
        data = self._content[offset : offset + size]
        for i, rule in enumerate(self._rules):
            if self._left[i] and offset < rule.stop and offset + size > rule.start:
                self._left[i] -= 1
                self._hits += 1
                if rule.kind == "stall":
                    self._held.append((unique, offset, size))
                    return
                self._answer(unique, self._changed(rule, data, offset, size))
                return
        self._answer(unique, data)

    def _changed(self, rule: Rule, data: bytes, offset: int, size: int) -> bytes | int:
        if rule.kind == "eio":
            return errno.EIO
        if rule.kind == "short":
            return data[: len(data) // 2]
        if rule.kind == "wrong":
            return data.translate(bytes(255 - b for b in range(256)))
        assert rule.kind == "old", rule.kind
        return self._content[offset + rule.shift : offset + rule.shift + size].ljust(size, b"\0")


def main(folder: str, content: str) -> int:
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={MAX_READ}"
    if libc().mount(b"flashllm-test", folder.encode(), b"fuse", MS_NOSUID_NODEV, options.encode()):
        return NO_MOUNT + ctypes.get_errno()
    server = Server(fd, Path(content).read_bytes())
    print("mounted", flush=True)
    try:
        while not server.ended:
            ready, _, _ = select.select([fd, sys.stdin], [], [])
            if fd in ready:
                server.serve_one()
            if sys.stdin in ready:
                line = sys.stdin.readline()
                if not line:
                    return 0
                print(json.dumps(server.command(line)), flush=True)
        return 0
    finally:
        libc().umount2(folder.encode(), MNT_DETACH)
        os.close(fd)  # what is held back fails


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
