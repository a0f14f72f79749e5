"""A recurrent model's memory does not grow with its text: peaks of whole processes (VmHWM)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flashllm import convert
from flashllm.units import MIB

from .rwkv_models import exported, official, written

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from rwkv_peak import peak  # noqa: E402

# Ids, lists of them and their times are kept for the caller: some 110 bytes a token.  A KV cache of
# this model would take 1.5 KiB a token, 15 MB for 10,000.
ROOM, BUDGET = 1536 * 1024, 96 * MIB


@pytest.mark.parametrize("version", ["4", "7"])
def test_the_peak_after_10000_tokens_is_that_after_100(tmp_path, version):
    path = tmp_path / "m.flash"
    convert(written(tmp_path / "m.bin", exported(official(version), version)), path)
    short = least_peak(path, 100, "prompt")
    assert short <= BUDGET
    assert abs(least_peak(path, 10_000, "prompt") - short) <= ROOM
    assert abs(least_peak(path, 1_000, "answer") - short) <= ROOM  # 10,000: rwkv_peak.py


def least_peak(path, n_tokens, how):
    """Of two processes: one was 2 MiB larger than its like, once in some hundred."""
    return min(peak(path, n_tokens, how, BUDGET) for _ in range(2))
