"""The frame of a process that runs one engine inside a limit and reports in lines of JSON.

Exit codes are the command line's: 4 when the budget is refused, with a line that names the floor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..api import LLM
from ..errors import BudgetError, FlashError
from ..probe.process import process_memory
from ..units import MIB, parse_size


def run_engine(argument: str, work: Callable[[LLM, dict], dict[str, Any]]) -> int:
    """Open the engine of a spec (JSON: model, engine, limit_data) and do its `work`, whose answer
    is the last line, said once the engine is closed; the exit code."""
    spec = json.loads(argument)
    if spec.get("limit_data"):
        limit_data(parse_size(spec["engine"]["ram_budget"]))
    try:
        with LLM(spec["model"], **spec["engine"]) as llm:
            last = work(llm, spec)
    except BudgetError as error:
        say({"event": "refused", "floor": error.floor_bytes})
        return error.exit_code
    except FlashError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    say(last)
    return 0


def say(what: dict[str, Any]) -> None:
    """A line for the watcher outside."""
    print(json.dumps(what), flush=True)


def limit_data(budget: int) -> None:
    """RLIMIT_DATA so that private memory may grow by what the budget has left, and by 96 MiB of
    address space that is reserved and hardly touched (thread stacks of 8 MiB, a later ring)."""
    import resource

    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    private = int(fields["VmData"].split()[0]) * 1024
    limit = private + max(0, budget - process_memory().rss) + 96 * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
