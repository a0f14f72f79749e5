"""Settings: argument before environment before default; bad text is refused with its name."""

from __future__ import annotations

import pytest

from flashllm.errors import UnknownNameError, UsageError
from flashllm.settings import SETTINGS, resolve


def test_order_of_sources():
    environ = {"FLASHLLM_NUM_THREADS": "3"}
    assert resolve("num_threads", 5, environ).value == 5
    found = resolve("num_threads", None, environ)
    assert (found.value, found.source) == (3, "FLASHLLM_NUM_THREADS")
    assert resolve("num_threads", None, {}).source == "default"


@pytest.mark.parametrize("name, text", [("num_threads", "two"), ("io_depth", "0"), ("debug", "?")])
def test_unreadable_environment_is_an_error(name, text):
    variable = SETTINGS[name].variable
    with pytest.raises(UsageError, match=variable):
        resolve(name, None, {variable: text})


def test_unknown_setting():
    with pytest.raises(UnknownNameError, match="io_depth"):
        resolve("io_dept")
