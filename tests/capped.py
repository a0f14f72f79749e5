"""Child processes in memory cgroups, cold caches, and models to run there: for the cap tests."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from flashllm.probe.cgroup import Charges, MemoryGroup
from flashllm.stress.confine import can_confine, make_cold

from .patience import patience

PROMPT = "1,5,9,20,33,7,42,11"


@dataclass(frozen=True)
class Run:
    """A finished child: exit code, what it printed, what the kernel counted."""

    code: int
    out: str
    err: str
    charges: Charges

    @property
    def result(self) -> dict:
        assert self.code == 0, f"exit code {self.code}, {self.charges}\n{self.err[-3000:]}"
        return json.loads(self.out)


_why_not = can_confine()
needs_cgroup = pytest.mark.skipif(_why_not is not None, reason=str(_why_not))


def generate(
    model: Path, budget: int, *extra: str, group_bytes: int | None = None, tokens: int = 32,
    cold: bool = True,
) -> Run:  # fmt: skip
    """`flashllm generate --json` in a fresh group of `group_bytes` (default: the budget)."""
    if cold:
        assert make_cold(model) == 0, "the cache is not cold: this test would prove nothing"
    command = [
        sys.executable, "-m", "flashllm", "generate", str(model), "--json", "--ignore-eos",
        "--token-ids", PROMPT, "--max-tokens", str(tokens), "--temperature", "0",
        "--ram-budget", str(budget), *extra,
    ]  # fmt: skip
    return run(command, group_bytes or budget)


def run(command: list[str], group_bytes: int) -> Run:
    with MemoryGroup(group_bytes, name="flashllm-test") as group:
        child = group.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out, err = child.communicate(timeout=patience(300))
        return Run(child.returncode, out, err, group.charges())
