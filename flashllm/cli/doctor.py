"""`flashllm doctor [MODEL]`: what this machine is, what was chosen and why."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile

import numpy as np

from .. import __version__
from ..errors import FlashError
from ..kernels import choose_kernels, kernel_troubles
from ..settings import SETTINGS, resolve, usable_processors
from ..units import MIB, format_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="probe this file's device, else a scratch file's")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    report = {
        "flashllm": __version__,
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": usable_processors(),
        "threads": _threads(),
        "kernels": _kernels(),
        "memory": _memory(),
        "device": _device(args.model),
        "settings": _settings(),
    }
    if args.json:
        print(json.dumps(report))
    else:
        _show(report)
    return 0


def _kernels() -> dict:
    asked = resolve("kernels")
    chosen = choose_kernels(asked.value, n_threads=1)
    try:
        return {"chosen": chosen.name, "source": asked.source, "sets": {
            name: why or "runs here" for name, why in kernel_troubles().items()}}
    finally:
        chosen.close()


def _threads() -> dict:
    asked = resolve("num_threads")
    if asked.value is not None:
        return {"compute": asked.value, "source": asked.source}
    return {"compute": usable_processors(), "source": "usable processors"}


def _memory() -> dict:
    from ..probe.cgroup import MemoryGroup
    from ..probe.memory import automatic_budget

    budget = automatic_budget()
    try:
        with MemoryGroup(64 * MIB, name="flashllm-doctor") as group:
            groups = f"yes (v{group.version}): RAM caps can be enforced by the kernel here"
    except FlashError as error:
        groups = f"no: {error}"
    return {"automatic_budget_bytes": budget.n_bytes, "source": budget.source, "cgroups": groups}


def _device(model: str | None) -> dict:
    if model is not None:
        return _probe(model)
    with tempfile.NamedTemporaryFile(dir=".", prefix=".flashllm-doctor-") as scratch:
        # Random bytes: a device that compresses must not flatter itself.
        noise = np.random.default_rng(0).integers(0, 256, MIB, np.uint8).tobytes()
        for _ in range(64):
            scratch.write(noise)
        scratch.flush()
        return _probe(scratch.name)


def _probe(path: str) -> dict:
    from ..probe.device import choose_storage
    from ..storage import open_storage

    engine = resolve("io_engine").value
    choice = choose_storage(path, engine=engine)
    with open_storage(choice.name, path, depth=1, engine=engine) as storage:
        io_engine = storage.engine
    curve = choice.curve
    return {
        "storage": choice.name,
        "why": choice.why,
        "io_engine": io_engine,
        "uring": _ring_trouble(path) or "works here",
        "sequential_bytes_per_s": curve.sequential_bytes_per_s,
        "seconds_for_1000_reads": {
            str(size): curve.seconds(1000, size) for size in (4096, 16384, 65536, 262144, MIB)
        },
    }


def _ring_trouble(path: str) -> str:
    """Why io_engine uring cannot read this file; "" when it can."""
    from ..storage import open_storage

    try:
        open_storage("direct", path, depth=1, engine="uring").close()
    except FlashError as error:
        return str(error)
    return ""


def _settings() -> list[dict]:
    rows = []
    for name, setting in SETTINGS.items():
        found = resolve(name)
        rows.append({"name": name, "variable": setting.variable, "value": found.value,
                     "source": found.source, "meaning": setting.meaning})
    return rows


def _show(report: dict) -> None:
    print(f"flashllm {report['flashllm']}, Python {report['python']}, NumPy {report['numpy']}")
    print(f"{report['machine']}, {report['processors']} processors")
    threads, kernels = report["threads"], report["kernels"]
    print(f"\ncompute threads: {threads['compute']} (from {threads['source']})")
    print(f"kernel set: {kernels['chosen']} (from {kernels['source']})")
    for name, why in kernels["sets"].items():
        print(f"  {name:<10} {why}")
    memory = report["memory"]
    print(f"\nautomatic RAM budget: {format_size(memory['automatic_budget_bytes'])} "
          f"({memory['source']})")
    print(f"memory cgroups: {memory['cgroups']}")
    device = report["device"]
    print(f"\nstorage backend: {device['storage']} ({device['why']})")
    print(f"  I/O engine: {device['io_engine']} (uring: {device['uring']})")
    rate = device["sequential_bytes_per_s"] / 1e6
    print(f"  sequential {rate:.0f} MB/s; 1000 scattered reads of")
    for size, seconds in device["seconds_for_1000_reads"].items():
        rate = 1000 * int(size) / seconds / 1e6
        print(f"  {format_size(int(size)):>10}: {seconds * 1e3:7.1f} ms  ({rate:.0f} MB/s)")
    print("\nsettings (argument > environment > default):")
    for row in report["settings"]:
        print(f"  {row['variable']:<26} {str(row['value']):<8} from {row['source']:<26} "
              f"{row['meaning']}")
