"""The long checks, one after the other, and a card of what each said last.

    python bench/long.py [PART ...] [--out bench/results/long]

Parts are those of PARTS, all of them if none is named; about two hours on an idle machine.  Every
part runs whatever became of the others; the card is written after each, and keeps what it holds of
parts that did not run this time.  The exit status is 1 if one failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cards import write_card

ROOT = Path(__file__).parent.parent
LAST_LINES = 45
PYTHON, FLASHLLM = "python", "python -m flashllm"
PARTS = {
    "tests": f"{PYTHON} -m pytest -q --long -p no:cacheprovider --durations=10",
    "stress": f"{FLASHLLM} stress",
    "interrupts": f"{PYTHON} bench/interrupts.py",
    "fuzz": f"{PYTHON} -m tests.fuzz.run_atheris all --seconds 80",
    "soak": f"{FLASHLLM} stress --soak 3600",
}
NEEDED = {"fuzz": "atheris"}  # a part that is left out, and says so, where this does not import


def run(command: str) -> dict[str, Any]:
    """Exit code, seconds and last lines of a command, which says them here as well."""
    started, last = time.monotonic(), deque(maxlen=LAST_LINES)
    words = [sys.executable if word == PYTHON else word for word in command.split()]
    child = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in child.stdout:
        print(line, end="", flush=True)
        last.append(line.rstrip())
    code = child.wait()
    return {
        "command": command, "code": code, "seconds": round(time.monotonic() - started),
        "load": round(os.getloadavg()[2], 1), "commit": commit(), "last": list(last),
    }  # fmt: skip


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def card(parts: dict[str, dict[str, Any]]) -> str:
    """`parts` as a table, then the last lines of each."""
    lines = [
        "# The long checks and what they said last", "",
        "`make long` runs all of them, one after the other; each row is the last run of that part.",
        "The load is the machine's, over the last quarter of an hour of the part: more than the",
        "number of processors means that others wanted them too.", "",
        "| part | command | exit code | seconds | load | commit |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, part in parts.items():
        lines.append(f"| {name} | `{part['command']}` | {part['code']} | {part['seconds']} | "
                     f"{part['load']} | {part['commit']} |")  # fmt: skip
    for name, part in parts.items():
        lines += ["", f"## {name}", "", "```", *part["last"], "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/long")
    args = parser.parse_args()
    if unknown := sorted(set(args.part) - PARTS.keys()):
        parser.error(f"no such part: {', '.join(unknown)}")
    raw = args.out.with_suffix(".json")
    parts = json.loads(raw.read_text()) if raw.exists() else {}
    failed = 0
    for name in args.part or PARTS:
        needs = NEEDED.get(name)
        if needs is not None and importlib.util.find_spec(needs) is None:
            print(f"{name}: left out, {needs} is not installed", flush=True)
            continue
        parts[name] = run(PARTS[name])
        failed |= parts[name]["code"] != 0
        parts = {one: parts[one] for one in PARTS if one in parts}
        write_card(args.out, parts, card(parts))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
