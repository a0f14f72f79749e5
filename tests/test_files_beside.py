"""What lies beside a model and is read with it, or instead of it: thresholds, states, curves,
journals, traces, texts.  Whatever has their name, FIFOs, devices and bombs among it: a typed error
within a second and 16 MiB, and no wait."""

from __future__ import annotations

import json
import os
import shutil
import socket
from types import SimpleNamespace

import pytest

from flashllm import LLM, Snapshot, convert
from flashllm.assembly import generation_config
from flashllm.checkpoints import open_checkpoint
from flashllm.cli.streams import MAX_TEXT, read_text
from flashllm.container import Container, open_container
from flashllm.durable import WholeFile
from flashllm.engine.sampling import SamplingParams
from flashllm.errors import (
    CheckpointError,
    FlashReadError,
    FormatError,
    UnsupportedError,
    UsageError,
)
from flashllm.models.configs import config_from_hf
from flashllm.plotting.sources import charts_of
from flashllm.predictors.magnitude import read_magnitudes
from flashllm.probe.curve import DeviceCurve
from flashllm.regular import open_regular
from flashllm.tracing import read_trace
from flashllm.tracing.activity import decode_activity

from . import tiny
from .cheap import refused

READERS = {
    "thresholds": read_magnitudes,
    "state": Snapshot.load,
    "curve": DeviceCurve.load,
    "trace": read_trace,
    "plot": charts_of,
    "container": open_container,
    "checkpoint": open_checkpoint,
}


def a_socket(path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def a_loop(path) -> None:
    path.symlink_to(path)


# kind -> how it is made
PLACES = {
    "a FIFO": os.mkfifo,
    "a socket": a_socket,
    "a directory": lambda path: path.mkdir(),
    "a device without an end": lambda path: path.symlink_to("/dev/zero"),
    "a loop of links": a_loop,
    "nothing": lambda path: None,
    "an empty file": lambda path: path.touch(),
    "a terabyte of holes": lambda path: (path.touch(), os.truncate(path, 2**40)),
    "a gigabyte of holes": lambda path: (path.touch(), os.truncate(path, 2**30)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", PLACES)
def test_places(tmp_path, kind, reader):
    path = tmp_path / "x"
    PLACES[kind](path)
    kinds = (FormatError, FlashReadError)
    if (kind, reader) == ("a directory", "checkpoint"):
        kinds = CheckpointError  # empty, as a directory of one
    refused(kinds, lambda: READERS[reader](path))


@pytest.mark.parametrize("name", ["a\0b", "half \ud800 a letter"])
@pytest.mark.parametrize("use", [*READERS.values(), open_regular, WholeFile, LLM])
def test_what_is_no_path(name, use):
    with pytest.raises(UsageError, match="is no path"):
        use(name)


def test_a_shard_that_is_no_file_name(tmp_path):
    for name in ("a\0b.safetensors", "\ud800", "a\nb", "../model.safetensors", "/x", "", "."):
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": name}})
        )
        with pytest.raises(CheckpointError, match="plain name"):
            open_checkpoint(tmp_path)


BOMBS = {
    "lists": b"[" + b"[]," * 300_000 + b"[]]",
    "deep": b"[" * 200_000,
    "numbers": b'{"densities": [' + b"1," * 400_000 + b"1]}",
    "digits": b'{"densities": [' + b"9" * 100_000 + b"]}",
    "half a letter": b'{"name": "\\ud800"}',
    "not UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("reader", ["thresholds", "curve", "plot"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(tmp_path, bomb, reader):
    path = tmp_path / "x"
    path.write_bytes(BOMBS[bomb])
    # The version is asked first: whatever has another one may be right in its own way.
    refused((FormatError, UnsupportedError), lambda: READERS[reader](path))


GOOD = {"densities": [0.3, 0.5], "layers": {"0": [0.2, 0.1]}, "model": "0" * 64, "n_tokens": 5,
        "text": "0" * 64, "version": 1}  # fmt: skip


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "9" * 400, "-" + "9" * 400, "true"])
def test_thresholds_that_are_no_numbers(tmp_path, number):
    path = tmp_path / "x"
    for key in ("densities", "0"):
        said = json.dumps(GOOD)
        said = said.replace(f'"{key}": [', f'"{key}": [{number}, ', 1)
        path.write_text(said)
        with pytest.raises(FormatError, match=key):
            read_magnitudes(path)


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "head_dim", "vocab_size"])
@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf"), "1", [], True])
def test_numbers_of_a_config(key, value):
    raw = json.loads((tiny.GOLDEN / "llama-relu/config.json").read_text())
    raw.pop("rope_parameters", None)
    raw.pop("rope_scaling", None)
    with pytest.raises(CheckpointError, match=key):
        config_from_hf({**raw, key: value})


GENERATION = {
    b"[" * 100_000: "JSON",
    b"{": "JSON",
    b"[]": "an object",
    b'{"do_sample": true, "temperature": "hot"}': "temperature",
    b'{"do_sample": true, "temperature": NaN}': "temperature",
    b'{"do_sample": true, "top_k": 1e999}': "top_k",
    b'{"do_sample": true, "top_p": ' + b"9" * 400 + b"}": "top_p",
    b'{"repetition_penalty": []}': None,  # as if there were none
    b'{"repetition_penalty": [1]}': "repetition_penalty",
    b'{"a": "' + b"x" * 2**18 + b'"}': "at most",
}


@pytest.mark.parametrize("content", GENERATION, ids=lambda c: c[:40].decode())
def test_how_to_generate(content):
    """A container may carry any generation_config.json, with a right checksum."""
    name, said = "generation_config.json", GENERATION[content]
    carrying = SimpleNamespace(
        path="m.flash", blobs={name: SimpleNamespace(n_bytes=len(content))},
        read_blob=lambda _: content,
    )  # fmt: skip
    if said is None:
        assert SamplingParams().resolved(generation_config(carrying)).repetition_penalty == 1.0
    else:
        refused(FormatError, lambda: generation_config(carrying), f"m.flash: {name}.*{said}")


def test_a_text_without_an_end():
    with pytest.raises(UsageError, match=f"/dev/zero: more than {MAX_TEXT} characters"):
        read_text("/dev/zero")


def test_a_text_out_of_a_pipe(tmp_path):
    """`<(…)` of a shell is a text as good as any."""
    read, write = os.pipe()
    os.write(write, "ä text".encode())
    os.close(write)
    try:
        assert read_text(f"/dev/fd/{read}") == "ä text"
    finally:
        os.close(read)


def test_values_that_no_chart_can_be_made_of(tmp_path):
    path = tmp_path / "x"
    row = {"test": 1, "cap": [], "tokens_per_s": "fast", "failed": "", "per_token_ms": [],
           "floor_ms": 3, "bytes_per_token": None, "hit_rate": {}, "facts": 5, "cap_bytes": "x"}
    line = {"token": "x", "ms": None, "at_s": [], "rss": "much", "parts_ms": {"a": "b"},
            "bytes_read": {}, "reads": 0, "hits": "a", "misses": 1, "prefetch_bytes": 0,
            "audit_bytes": 0, "bundles_read": 0}  # fmt: skip
    facts = {"flashllm_run": 1, "model": "m", "ram_budget": 5}
    for text in (
        json.dumps({"flashllm_bench": 1, "rows": [row, {**row, "cap_bytes": 5}]}),
        "\n".join(map(json.dumps, [facts, line, line])),
        json.dumps(facts) + "\n" + "[" * 200_000,
    ):
        path.write_text(text)
        with pytest.raises(FormatError):
            charts_of(path)


def test_the_model_is_not_written_over(tmp_path):
    """`--trace MODEL` would empty it while it is read."""
    from flashllm.cli.main import main

    model = tiny.container(tmp_path)
    before = model.read_bytes()
    shutil.copy(model, tmp_path / "copy")
    os.link(model, tmp_path / "link")
    for out in (model, tmp_path / "link"):
        argv = ["generate", str(model), "--token-ids", "1,2", "-n", "1", "--trace", str(out),
                "--ram-budget", "1GiB"]  # fmt: skip
        assert main(argv) == 2 and model.read_bytes() == before


def test_what_is_carried_and_not_a_tokenizer_is_not_read(tmp_path, monkeypatch):
    """It may be larger than the budget."""
    path = tmp_path / "m.flash"
    convert(str(tiny.checkpoint(tmp_path)), str(path))
    read, really = [], Container.read_blob

    def seen(container, name):
        read.append(name)
        return really(container, name)

    monkeypatch.setattr(Container, "read_blob", seen)
    checkpoint = tmp_path / "llama-relu"
    (checkpoint / "chat_template.jinja").write_text("x" * 1000)
    convert(str(checkpoint), str(path), overwrite=True)
    with LLM(str(path), ram_budget="1GiB") as llm:
        assert llm.tokenizer is not None and "chat_template.jinja" in llm.container.blobs
    assert set(read) <= {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("raw", [b"[" * 100_000, b"[]", b'{"a": 2}', b'{"a": NaN}', b"{}" * 2**18])
def test_activity_that_is_none(raw):
    refused(FormatError, lambda: decode_activity("m.flash", raw), "blob activity.json")
