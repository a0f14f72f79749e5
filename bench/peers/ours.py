"""Ourselves under the peers' contract: as configured, and the naive mode (nothing is kept)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flashllm.errors import UnsupportedError
from flashllm.predictors.fit import fit_path

from .base import Job, Peer

CHILD = str(Path(__file__).with_name("ours_child.py"))


class Ours(Peer):
    """`settings` are LLM's keyword arguments."""

    def __init__(self, name: str, **settings: object):
        self.name, self._settings = name, settings

    def available(self) -> str | None:
        return None

    def prepare(self, model: Path, folder: Path) -> Path:
        if self._settings.get("mode") == "approx" and not fit_path(model).exists():
            raise UnsupportedError("no predictors are fitted to this model")
        return model

    def command(self, file: Path, job: Job) -> list[str]:
        budget = job.cap if job.capped else 4 * job.cap
        settings = {"ram_budget": budget, "num_threads": job.threads, **self._settings}
        return [
            sys.executable, CHILD, str(file), "--prompt", ",".join(map(str, job.prompt)),
            "--tokens", str(job.tokens), "--settings", json.dumps(settings),
        ]  # fmt: skip
