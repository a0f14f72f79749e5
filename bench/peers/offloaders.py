"""Peers on PyTorch that read layers from disk: accelerate's offload and AirLLM."""

from __future__ import annotations

import sys
from pathlib import Path

from .base import Job, Peer, cannot_import, run_script

CHILD = "offload_child.py"
MODULES = {"accelerate disk offload": ("accelerate", "transformers"), "AirLLM": ("airllm",)}


class Offloader(Peer):
    """`name` is one of MODULES."""

    def __init__(self, name: str, python: str | None):
        self.name, self._python = name, python

    def available(self) -> str | None:
        return cannot_import(self._python, *MODULES[self.name])

    def prepare(self, model: Path, folder: Path) -> Path:
        directory = folder / f"{model.stem}-hf"
        note = directory / "difference"
        if not note.exists():
            found = run_script(sys.executable, "hf_files.py", model, directory)
            note.write_text("; ".join(filter(None, ["bf16 weights", found])))
        if self.name == "AirLLM":
            run_script(str(self._python), CHILD, directory, "--split")
        return directory

    def difference(self, file: Path) -> str:
        return (file / "difference").read_text()

    def command(self, file: Path, job: Job) -> list[str]:
        return [
            str(self._python), str(Path(__file__).with_name(CHILD)), str(file),
            "--with", self.name.split()[0].lower(), "--threads", str(job.threads),
            "--prompt", ",".join(map(str, job.prompt)), "--tokens", str(job.tokens),
            "--cap", str(job.cap),
        ]  # fmt: skip
