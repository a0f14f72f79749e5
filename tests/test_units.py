"""Sizes in and out."""

from __future__ import annotations

import pytest

from flashllm.errors import UsageError
from flashllm.units import align_up, format_size, parse_size


@pytest.mark.parametrize(
    "text, size",
    [("512MiB", 2**29), ("1.5G", 3 * 2**29), ("2GiB", 2**31), ("1500M", 1500 * 2**20),
     ("64 kb", 65536), ("17", 17), (17, 17), ("50%", 500), ("12.5%", 125)],
)  # fmt: skip
def test_parse(text, size):
    assert parse_size(text, whole_bytes=1000) == size


@pytest.mark.parametrize("text", ["", "x", "5 parsecs", "-1", 0, "0%", None, 1.5, True, "1e3",
                                  "9" * 400, "9" * 400 + "%", 2**63])  # fmt: skip
def test_refused(text):
    with pytest.raises(UsageError):
        parse_size(text, whole_bytes=1000)


def test_a_percentage_needs_a_whole():
    with pytest.raises(UsageError):
        parse_size("50%")


def test_format_and_align():
    assert [format_size(n) for n in (17, 2048, 2**29, 2**32)] == [
        "17 B", "2.0 KiB", "512.0 MiB", "4.0 GiB"]  # fmt: skip
    assert [align_up(n, 512) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
