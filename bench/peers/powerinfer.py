"""PowerInfer's `main` binary and a model in its own format, both by path (its converter needs
predictors trained for the model, so the file cannot be made here)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flashllm.errors import UnsupportedError

from .base import Job, Peer, Timings

SPEED = r"{} time =.*?([\d.]+) tokens per second"


class PowerInfer(Peer):
    name = "PowerInfer"

    def __init__(self, binary: str | None, model: str | None):
        self._binary, self._model = binary, model

    def available(self) -> str | None:
        if self._binary is None or self._model is None:
            return "no PowerInfer binary and model were given"
        return None if os.access(self._binary, os.X_OK) else "the PowerInfer binary cannot be run"

    def prepare(self, model: Path, folder: Path) -> Path:
        file = Path(str(self._model))
        if not file.is_file():
            raise UnsupportedError("the PowerInfer model is not a file")
        return file

    def command(self, file: Path, job: Job) -> list[str]:
        # A word is about a token; the speed of the prompt is by the tokens it counts itself.
        return [
            str(self._binary), "-m", str(file), "-n", str(job.tokens), "-t", str(job.threads),
            "-p", " ".join(["on"] * len(job.prompt)), "--ignore-eos", "--temp", "0",
        ]  # fmt: skip

    def timings(self, out: str, err: str, job: Job) -> Timings:
        prefill = re.search(SPEED.format("prompt eval"), err)
        decode = re.search(SPEED.format(r"(?<!prompt )eval"), err)
        if decode is None:
            raise ValueError("PowerInfer printed no timings")
        return Timings(float(prefill[1]) if prefill else None, float(decode[1]), job.tokens - 1)
