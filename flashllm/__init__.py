"""flashllm: language models larger than the memory they may use.

Names are resolved on first use, so that `import flashllm` costs nothing but this file.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "Snapshot", "bundled_model", "convert", "__version__"]

_HOMES = {
    "LLM": "api",
    "SamplingParams": "engine.sampling",
    "Snapshot": "engine.snapshot",
    "bundled_model": "bundled",
    "convert": "conversion.convert",
}


def __getattr__(name: str):
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
