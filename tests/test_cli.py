"""The command line in processes of its own: streams, JSON, exit codes, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashllm import bundled_model

from . import tiny
from .patience import patience


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.container(tmp_path_factory.mktemp("cli")))


def flashllm(*args: str, env: dict | None = None, stdin: str | None = None):
    return subprocess.run(
        [sys.executable, "-m", "flashllm", *args], capture_output=True, text=True,
        timeout=patience(120),
        env={**os.environ, **(env or {})}, input=stdin,
    )  # fmt: skip


def test_generate_prints_text_on_stdout_and_the_plan_on_stderr(model):
    done = flashllm(
        "generate", model, "--prompt", "abc", "--max-tokens", "5", "--ram-budget", "300MiB"
    )
    assert done.returncode == 0, done.stderr
    assert "total" in done.stderr and "300.00 MiB" in done.stderr
    assert "process as it stands" not in done.stdout


def test_json_is_one_object_and_nothing_else(model):
    done = flashllm("generate", model, "--token-ids", "1,2,3", "--max-tokens", "4", "--json",
                    "--ram-budget", "300MiB", "--ignore-eos")  # fmt: skip
    result = json.loads(done.stdout)
    assert len(result["tokens"]) == 4 and result["finish_reason"] == "length"
    assert {"text", "seed", "usage", "timings", "flash"} <= result.keys()


def test_several_prompts_are_an_object_a_line(model):
    done = flashllm("generate", model, "-p", "abc", "-p", "d", "--max-tokens", "4", "--json",
                    "--ram-budget", "300MiB", "--ignore-eos")  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["usage"]["prompt_tokens"] for r in results] == [4, 2]  # BOS
    assert [r["flash"]["sequences"] for r in results] == [2, 2]


def test_stdin_prompt_equals_argument(model):
    args = ("generate", model, "--max-tokens", "6", "--ram-budget", "300MiB", "--prompt")
    assert flashllm(*args, "-", stdin="abc").stdout == flashllm(*args, "abc").stdout


@pytest.mark.parametrize(
    "args, code, said",
    [
        (("generate", "MODEL", "--prompt", "a", "--ram-budget", "1MiB"), 4, "floor"),
        (("generate", "MODEL", "--prompt", "a", "--ram-budget", "cheap"), 2, "cheap"),
        (("generate", "MODEL"), 2, "--prompt"),
        (("generate", "MODEL", "--token-ids", "1,x"), 2, "token-ids"),
        (("generate", "MODEL", "--token-ids", "99999"), 2, "99999"),
        (("generate", "MODEL", "--prompt", "a", "--storage", "tape"), 2, "direct"),
        (("generate", "/nonexistent.flash", "--prompt", "a"), 1, "nonexistent"),
        (("generate", __file__, "--prompt", "a"), 3, "magic"),
        (("convert", __file__, "out.flash"), 3, "test_cli"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_exit_codes_name_the_trouble(model, args, code, said, tmp_path):
    args = [model if a == "MODEL" else str(tmp_path / a) if a == "out.flash" else a for a in args]
    done = flashllm(*args)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


def test_refusal_below_the_floor_is_quick(model):
    flashllm("generate", model, "--prompt", "a", "--ram-budget", "1MiB")  # warm the imports
    started = time.monotonic()
    flashllm("generate", model, "--prompt", "a", "--ram-budget", "1MiB")
    assert time.monotonic() - started < patience(5)  # the promise is one second on an idle machine


def test_inspect_verify_estimate(model):
    shown = json.loads(flashllm("inspect", model, "--json").stdout)
    assert shown["family"] == "llama" and shown["planes"]
    assert flashllm("inspect", model).returncode == 0
    assert flashllm("verify", model).returncode == 0
    estimate = json.loads(flashllm("estimate", model, "--ram-budget", "300MiB", "--json").stdout)
    assert sum(estimate["ledger"].values()) == estimate["ram_budget"] == 300 * 2**20
    assert 0 < estimate["floor_bytes"] < 300 * 2**20


def test_verify_finds_a_flipped_byte(model, tmp_path):
    broken = tmp_path / "broken.flash"
    data = bytearray(Path(model).read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    assert flashllm("verify", str(broken)).returncode == 3


def test_doctor_names_choices_and_sources(model):
    done = flashllm("doctor", model, "--json", env={"FLASHLLM_IO_DEPTH": "7"})
    report = json.loads(done.stdout)
    assert report["kernels"]["chosen"] in report["kernels"]["sets"]
    depth = next(row for row in report["settings"] if row["name"] == "io_depth")
    assert (depth["value"], depth["source"]) == (7, "FLASHLLM_IO_DEPTH")
    assert flashllm("doctor", model).returncode == 0


def test_a_kernel_set_forced_by_the_environment(model):
    args = ("generate", model, "--token-ids", "1,2", "--max-tokens", "2", "--json")
    done = flashllm(*args, env={"FLASHLLM_KERNELS": "serial"})
    assert json.loads(done.stdout)["flash"]["kernels"] == "serial"
    assert flashllm(*args, env={"FLASHLLM_KERNELS": "abacus"}).returncode == 2


def test_interrupt_ends_with_130():
    # The bundled model under the NumPy kernels takes far longer for its 500 tokens than a signal.
    child = subprocess.Popen(
        [sys.executable, "-m", "flashllm", "generate", bundled_model(), "--prompt", "The sea",
         "--max-tokens", "500", "--ignore-eos", "--kernels", "reference"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell's background jobs inherit SIGINT ignored; here it must arrive.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    child.stdout.read(1)  # it is generating
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=patience(120))
    assert child.returncode == 130 and "Traceback" not in err, err


def test_version_and_help():
    assert "flashllm" in flashllm("--version").stdout
    assert "convert" in flashllm("--help").stdout
