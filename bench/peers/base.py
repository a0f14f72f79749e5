"""What every peer gives, so that one driver can run them in turn.

A Peer is a way to run a model of a given shape in a process of its own.  It says whether it can run
here (`available`), makes its own file from our container (`prepare`), and gives the command of one
run (`command`), which loads the file, feeds the prompt, decodes greedily and ends; `timings` reads
the figures out of what it printed.  A Peer never measures memory or the disk and sets no limit:
`measure` does that, the same way for all, and decides between ran, missing, killed and failed.

Prefill is the whole prompt in one call; decode counts the tokens after the first.  Loading is in
neither.
"""

from __future__ import annotations

import json
import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from confined import read_ahead, read_ahead_file, run_confined


@dataclass(frozen=True)
class Job:
    """One run.  `cap` bytes are the model's to use and the size of the group; with `capped` False
    the group is so large that nothing is short."""

    prompt: Sequence[int]
    tokens: int
    threads: int
    cap: int
    capped: bool
    timeout_s: float = 180

    @property
    def group_bytes(self) -> int:
        return self.cap if self.capped else 4 * self.cap + 2**32


@dataclass(frozen=True)
class Timings:
    """What a peer printed: tokens per second, and the bytes that decoding a token fetched from the
    device by the kernel's count for the process (/proc/self/io; None where it is not known)."""

    prefill_tokens_per_s: float | None
    tokens_per_s: float
    n_decoded: int
    decode_bytes_per_token: float | None = None
    tokens: list[int] = field(default_factory=list)


class Peer(ABC):
    """name: on the card, setting included.  read_ahead_kib: of the device during its runs, or None
    for the setting as found."""

    name: str
    read_ahead_kib: int | None = None

    @abstractmethod
    def available(self) -> str | None:
        """None where it can run, else why not."""

    @abstractmethod
    def prepare(self, model: Path, folder: Path) -> Path:
        """Its file (or directory) for the container `model`, made in `folder` unless it is there.

        Raises UnsupportedError where the peer cannot express the model.
        """

    @abstractmethod
    def command(self, file: Path, job: Job) -> list[str]:
        """The process of one run."""

    def timings(self, out: str, err: str, job: Job) -> Timings:
        """The figures in what a run printed; of the children here a JSON object comes last."""
        seen = json.loads(out.strip().splitlines()[-1])
        return Timings(
            seen["prefill_tokens_per_s"], seen["tokens_per_s"], len(seen["tokens"]) - 1,
            seen["decode_bytes_per_token"], seen["tokens"],
        )  # fmt: skip

    def difference(self, file: Path) -> str:
        """What the peer computes differently from our model, for the card."""
        return ""


def measure(peer: Peer, file: Path, job: Job) -> dict[str, Any]:
    """One run: {"state": "ran" | "killed" | "too slow" | "failed", …}, ready for JSON."""
    files = sorted(file.rglob("*")) if file.is_dir() else [file]
    with ExitStack() as stack:
        if peer.read_ahead_kib is not None:
            stack.enter_context(read_ahead(file, peer.read_ahead_kib))
        done = run_confined(
            peer.command(file, job), group_bytes=job.group_bytes,
            files=[path for path in files if path.is_file() and path.stat().st_size],
            timeout_s=job.timeout_s,
            env=environment(),
        )  # fmt: skip
    seen = {
        "code": done.code, "seconds": done.seconds, "device_bytes": done.device_bytes,
        "charges": asdict(done.charges),
    }  # fmt: skip
    if done.timed_out:
        return {"state": "too slow", "why": f"no end after {job.timeout_s:.0f} s", **seen}
    if done.charges.oom_kills:
        return {"state": "killed", "why": "by the memory limit", **seen}
    if done.code:
        last = done.err.strip().splitlines()[-1:] or ["no message"]
        return {"state": "failed", "why": last[0][-300:], **seen}
    return {"state": "ran", **asdict(peer.timings(done.out, done.err, job)), **seen}


def trouble(peer: Peer, folder: Path) -> str | None:
    """Why the peer's runs would mean nothing here, or None."""
    if peer.read_ahead_kib is not None:
        setting = read_ahead_file(folder)
        if not os.access(setting, os.W_OK):
            return f"the device's read-ahead cannot be set ({setting})"
    return peer.available()


def environment() -> dict[str, str]:
    """Children find this project, wherever their interpreter lives, and no hub is asked."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}


def cannot_import(python: str | None, *modules: str) -> str | None:
    """Why `python` lacks one of `modules`, or None."""
    if python is None:
        return "no Python with " + ", ".join(modules) + " was given"
    done = subprocess.run(
        [python, "-c", f"import {', '.join(modules)}"], capture_output=True, text=True,
    )  # fmt: skip
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]


def run_script(python: str, script: str, *arguments: object) -> str:
    """Output of one of the scripts beside this file; RuntimeError with its last words."""
    path = Path(__file__).with_name(script)
    done = subprocess.run(
        [python, str(path), *map(str, arguments)], capture_output=True, text=True,
        env=environment(),
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout.strip()
