"""The one place that reads the environment.

Every setting has a name, an environment twin FLASHLLM_<NAME>, a parser and a default.  An explicit
argument wins over the environment, the environment over the default; where a value came from is
kept, so that `flashllm doctor` can say it.  A value that cannot be read is an error with the
variable's name and the text found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UnknownNameError, UsageError


@dataclass(frozen=True)
class Setting:
    """`parse` turns the environment's text into the value an argument would have."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    meaning: str

    @property
    def variable(self) -> str:
        return "FLASHLLM_" + self.name.upper()


@dataclass(frozen=True)
class Resolved:
    """A value and where it came from: "argument", the variable's name, or "default"."""

    value: Any
    source: str


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError("must be at least 1")
    return number


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError("must be 0 or more")
    return number


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no", ""):
        return False
    raise ValueError("must be 0 or 1")


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("ram_budget", str, None, "what the process may use: bytes, 512MiB, 50%"),
        Setting("storage", str, "auto", "auto, direct, pread or mmap"),
        Setting("kernels", str, "auto", "auto or the name of a kernel set"),
        Setting("num_threads", _count, None, "compute threads; default: usable processors"),
        Setting("io_depth", _count, None, "reads in flight; default: 16 threads, or 64 in a ring"),
        Setting("io_engine", str, "threads", "who waits for the device: threads or uring"),
        Setting("n_context", _count, None, "most tokens of one sequence"),
        Setting("prefill_chunk", _count, 64, "prompt tokens that share a pass over the weights"),
        Setting("kv_type", str, "auto", "auto, f32 or f16"),
        Setting("policy", str, "lfu", "eviction policy of the bundle cache"),
        Setting("look_ahead", _whole, 0, "experts to read before the next layer's router asks"),
        Setting("mode", str, "exact", "exact, or approx: decode with predicted neurons only"),
        Setting("recall", float, 0.99, "approx: share of the active neurons to be predicted"),
        Setting("density", float, None, "approx, models without exact zeros: share to compute"),
        Setting("audit", _whole, 16, "approx: measure recall on every n-th token; 0 never"),
        Setting("speculate", str, "off", "draft tokens from the text: off, auto, or how many"),
        Setting("governor", _flag, False, "give memory back under memory pressure"),
        Setting("debug", _flag, False, "check every invariant after every step"),
    )
}


def resolve(
    name: str, explicit: Any = None, environ: Mapping[str, str] | None = None
) -> Resolved:
    """The value of setting `name`: `explicit` unless None, else the environment, else default."""
    if name not in SETTINGS:
        raise UnknownNameError("setting", name, list(SETTINGS))
    setting = SETTINGS[name]
    if explicit is not None:
        return Resolved(explicit, "argument")
    text = (os.environ if environ is None else environ).get(setting.variable)
    if text is None:
        return Resolved(setting.default, "default")
    try:
        return Resolved(setting.parse(text), setting.variable)
    except ValueError as error:
        raise UsageError(f"{setting.variable}={text!r}: {error}") from None


def usable_processors() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
