"""llama.cpp from the package index (llama-cpp-python), and llama-bench binaries by path."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .base import Job, Peer, Timings, cannot_import, run_script

CHILD = str(Path(__file__).with_name("llama_cpp_child.py"))


class _GGUFPeer(Peer):
    """`python` has the gguf package and writes the file."""

    python: str | None

    def prepare(self, model: Path, folder: Path) -> Path:
        file = folder / f"{model.stem}.gguf"
        note = file.with_suffix(".gguf.difference")
        if not note.exists():
            note.write_text(run_script(str(self.python), "gguf_file.py", model, file))
        return file

    def difference(self, file: Path) -> str:
        return file.with_suffix(".gguf.difference").read_text()


class LlamaCpp(_GGUFPeer):
    """Through llama-cpp-python's low-level API, in an environment of its own."""

    def __init__(
        self, python: str | None, *, read_ahead_kib: int | None = None, mmap: bool = True,
        repack: bool = True,
    ):  # fmt: skip
        self.python, self.read_ahead_kib, self._mmap = python, read_ahead_kib, mmap
        self._repack = repack
        self.name = "llama.cpp" if mmap else "llama.cpp, no mmap"
        if not repack:  # weights stay in the mapping: no second copy for the processor's liking
            self.name += ", not repacked"
        if read_ahead_kib is not None:
            self.name += f", read-ahead {read_ahead_kib} KiB"

    def available(self) -> str | None:
        return cannot_import(self.python, "llama_cpp", "gguf")

    def command(self, file: Path, job: Job) -> list[str]:
        return [
            str(self.python), CHILD, str(file), "--prompt", ",".join(map(str, job.prompt)),
            "--tokens", str(job.tokens), "--threads", str(job.threads),
            *([] if self._mmap else ["--no-mmap"]), *([] if self._repack else ["--no-repack"]),
        ]  # fmt: skip


class LlamaBench(_GGUFPeer):
    """A llama-bench binary: llama.cpp's own or a fork's, such as ik_llama.cpp's."""

    def __init__(self, name: str, binary: str | None, python: str | None):
        self.name, self._binary, self.python = name, binary, python

    def available(self) -> str | None:
        if self._binary is None:
            return "no llama-bench binary was given"
        if not os.access(self._binary, os.X_OK):
            return "the llama-bench binary cannot be run"
        return cannot_import(self.python, "gguf")

    def command(self, file: Path, job: Job) -> list[str]:
        return [
            str(self._binary), "-m", str(file), "-p", str(len(job.prompt)), "-n", str(job.tokens),
            "-t", str(job.threads), "-r", "1", "-o", "json",
        ]  # fmt: skip

    def timings(self, out: str, err: str, job: Job) -> Timings:
        tests = json.loads(out[out.index("[") :])
        prefill = next(test["avg_ts"] for test in tests if test["n_gen"] == 0)
        decode = next(test["avg_ts"] for test in tests if test["n_prompt"] == 0)
        return Timings(prefill, decode, job.tokens)
