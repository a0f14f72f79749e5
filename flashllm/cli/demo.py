"""`flashllm demo`: the bundled model, widened, told to run in half of its own size.

The parent widens the model, puts a child process into a memory cgroup of exactly the budget where
it may create one, and reads the kernel's numbers back; the child tells the story.  At the end the
same tokens are drawn with everything resident and compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from ..bundled import bundled_model
from ..errors import FlashError, UnsupportedError
from ..units import MIB, format_size, parse_size
from .footer import Footer, status_line
from .progress import Progress

PROMPT = "It was a dark night, and the old house"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", "-n", type=int, default=128)
    parser.add_argument("--size", default="512MiB", help="size of the widened model (at least)")
    parser.add_argument("--ram-budget", default="50%", help="of the widened file, or bytes")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--dir", help="where to put the widened model; default: a temporary folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # the process inside the cgroup
    parser.add_argument("--report", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    if args.child:
        return _tell(args)
    with ExitStack() as stack:
        folder = args.dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="flashllm-"))
        model = _widened(Path(folder), parse_size(args.size))
        file_bytes = model.stat().st_size
        budget = parse_size(args.ram_budget, whole_bytes=file_bytes)
        _say(f"\n{model.name}: {format_size(file_bytes)} on disk; budget {format_size(budget)} "
             f"({100 * budget / file_bytes:.0f} % of the file)\n")
        capped, charges = _capped_run(args, model, budget, Path(folder) / "capped.json")
        _say("\nThe same story with everything in memory, to compare …")
        resident = _resident_run(args, model, file_bytes, Path(folder) / "resident.json")
        return _verdict(capped, resident, charges, budget)


# ---------------------------------------------------------------------------------- the parent


def _widened(folder: Path, size: int) -> Path:
    """The bundled model widened to at least `size` bytes; made once per folder."""
    from ..conversion.enlarge import inflate

    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"demo-{size // MIB}MiB.flash"
    if out.exists():
        return out
    need = int(size * 1.3)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise FlashError(f"{folder}: {format_size(free)} free, the demo needs {format_size(need)}; "
                         "give another folder with --dir")
    _say(f"Widening the bundled model to {format_size(size)} (the same function, more bytes) …")
    progress = Progress()
    started = time.perf_counter()
    inflate(bundled_model(), out, size_bytes=size, progress=progress)
    progress.close()
    _say(f"… {time.perf_counter() - started:.0f} s")
    return out


def _capped_run(args: argparse.Namespace, model: Path, budget: int, report: Path):
    """The child under a kernel limit of exactly the budget, or watched where we may not."""
    from ..probe.cgroup import MemoryGroup

    command = _child_command(args, model, budget, report)
    try:
        group = MemoryGroup(budget, name="flashllm-demo")
    except UnsupportedError as error:
        _say(f"No kernel limit ({error}); the child watches its own charge instead.")
        subprocess.run(command, check=True)
        return json.loads(report.read_text()), None
    with group:
        _say(f"In a memory cgroup (v{group.version}) of exactly {budget} bytes:\n")
        child = group.popen(command)
        code = child.wait()
        charges = group.charges()
    if code:
        raise FlashError(f"the run under the cap ended with code {code}, "
                         f"{charges.oom_kills} kills by the kernel")
    return json.loads(report.read_text()), charges


def _resident_run(args: argparse.Namespace, model: Path, file_bytes: int, report: Path):
    command = _child_command(args, model, 4 * file_bytes, report)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(report.read_text())


def _child_command(args, model: Path, budget: int, report: Path) -> list[str]:
    return [
        sys.executable, "-m", "flashllm", "demo", "--child", str(model), "--report", str(report),
        "--ram-budget", str(budget), "--prompt", args.prompt, "--max-tokens", str(args.max_tokens),
        "--temperature", str(args.temperature), "--seed", str(args.seed),
    ]  # fmt: skip


def _verdict(capped: dict, resident: dict, charges, budget: int) -> int:
    same = capped["tokens"] == resident["tokens"]
    peak = charges.peak_bytes if charges else capped["peak_rss"]
    rss = capped["peak_rss"]
    kills = charges.oom_kills if charges else 0
    speed, resident_speed = capped["tokens_per_s"], resident["tokens_per_s"]
    _say(f"tokens identical to the resident run   {'yes' if same else 'NO'}")
    _say(f"peak the kernel charged                {format_size(peak)} of {format_size(budget)}"
         f"{'' if charges else ' (own RSS; no cgroup)'}")
    _say(f"peak RSS                               {format_size(rss)}")
    if charges:
        _say(f"limit hit after the plan / kills       {capped['limit_hits']} / {kills}")
    _say(f"tokens per second, capped / resident   {speed:.2f} / {resident_speed:.2f}")
    ok = same and peak <= budget and rss <= budget and not kills
    _say("The cap held and not a token differs." if ok else "This run broke a promise.")
    return 0 if ok else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------- the child


def _tell(args: argparse.Namespace) -> int:
    """Stream the story; a live footer on a terminal; the figures into --report."""
    from ..api import LLM

    def show_plan(plan) -> None:
        _say(plan.ledger.render() + "\n")

    with LLM(args.child, ram_budget=args.ram_budget, on_plan=show_plan) as llm, Footer() as footer:
        print(args.prompt, end="", flush=True)
        started, n_tokens, result = time.perf_counter(), 0, None
        stream = llm.stream(
            args.prompt, max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed,
            ignore_eos=True,
        )
        line = ""
        for delta in stream:
            print(delta, end="", flush=True)
            n_tokens += len(delta.tokens)
            seconds = time.perf_counter() - started
            line = status_line(n_tokens, seconds, llm.live(), llm.ram_budget)
            footer.show(line)
            result = delta.result
        print(flush=True)
    _say("\n" + line)
    Path(args.report).write_text(json.dumps({
        "tokens": result.tokens,
        "tokens_per_s": result.timings["predicted_per_second"] or 0.0,
        "peak_rss": result.flash["peak_rss"],
        "limit_hits": result.flash["limit_hits"],
    }))  # fmt: skip
    return 0
