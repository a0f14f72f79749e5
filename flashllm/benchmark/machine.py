"""What a number was measured on, for every card and table."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from .. import __version__
from ..probe.memory import read_lines


def about_machine() -> dict[str, Any]:
    """Version, processor, processors that may be used, operating system."""
    named = (line.partition(":")[2].strip() for line in read_lines(Path("/proc/cpuinfo"))
             if line.startswith("model name"))  # fmt: skip
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "flashllm": __version__,
        "cpu": next(named, platform.processor() or platform.machine()),
        "processors": usable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
