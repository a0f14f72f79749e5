"""Coverage-guided fuzzing of one reader, or of all in turn, where atheris installs (Linux x86-64).

    pip install atheris
    python -m tests.fuzz.run_atheris "fit manifest" [--seconds 60]
    python -m tests.fuzz.run_atheris all --seconds 60

A find ends the target's run; its input is written to tests/fuzz/corpus/TARGET, to be made smaller
by hand, and is replayed by the tests from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def fuzz(name: str, seconds: int) -> None:
    """Does not return: the fuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["flashllm"]):
        from tests.fuzz.targets import TARGETS, folder_of

    from flashllm.errors import FlashError

    one = TARGETS[name]
    work = Path(tempfile.mkdtemp(prefix="flashllm-fuzz-"))
    seeds = work / "seeds"
    seeds.mkdir()
    (seeds / "seed").write_bytes(one.seed())
    for known in (CORPUS / folder_of(name)).glob("*"):
        (seeds / known.name).write_bytes(known.read_bytes())
    folder = work / "files"
    folder.mkdir()

    def test_one(data: bytes) -> None:
        try:
            one.read(data, folder)
        except FlashError:
            return
        except BaseException:
            kept = CORPUS / folder_of(name)
            kept.mkdir(parents=True, exist_ok=True)
            (kept / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
            raise

    options = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048",
               f"-max_len={2 * len(one.seed()) + 4096}", "-print_final_stats=1"]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(seeds)], test_one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="a name of targets.TARGETS, or all")
    parser.add_argument("--seconds", type=int, default=60)
    args = parser.parse_args()
    if args.target != "all":
        fuzz(args.target, args.seconds)
    from tests.fuzz.targets import TARGETS

    failed = []
    for name in TARGETS:
        command = [sys.executable, "-m", "tests.fuzz.run_atheris", name, "--seconds",
                   str(args.seconds)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        lines = done.stderr.splitlines()
        told = [x.split(":", 2)[2].strip() for x in lines if "number_of_executed_units" in x]
        covered = [line for line in lines if " cov: " in line]
        cov = covered[-1].split(" cov: ")[1].split()[0] if covered else "?"
        print(f"{name:24} {'ok' if done.returncode == 0 else 'FOUND'}  "
              f"{told[0] if told else '?':>9} inputs, {cov} edges", flush=True)
        if done.returncode:
            failed.append(name)
            print("\n".join(lines[-40:]), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
