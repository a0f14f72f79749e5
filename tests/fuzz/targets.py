"""Every reader of files, as a function of bytes: what the fuzzers and the corpus replay run (R-28).

A target refuses with a FlashError or returns; anything else is a find.  Formats under a checksum
come twice: as they are, and as the part that the checksum covers, sealed again after every change,
so that the seal is not what catches it.  `seed()` is a small valid input.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flashllm._core import xxh64

from flashllm.benchmark.journal import COUNTERS
from flashllm.checkpoints import open_checkpoint
from flashllm.checkpoints.llama2c_tokenizer import read_tokens
from flashllm.codecs import CODECS
from flashllm.container import verify
from flashllm.conversion.opening import open_source
from flashllm.conversion.resolve import resolve
from flashllm.engine.snapshot import Snapshot
from flashllm.kernels import choose_kernels
from flashllm.plotting.charts import as_csv
from flashllm.plotting.sources import charts_of
from flashllm.predictors import open_fit
from flashllm.predictors.header import PREAMBLE as FIT_PREAMBLE
from flashllm.predictors.magnitude import read_magnitudes
from flashllm.probe.curve import DEFAULT_CURVE, DeviceCurve
from flashllm.tokenization import Tokenizer, WorldTokenizer
from flashllm.tracing.base import BLOCK_ROW, CHECKSUM, LayerInfo
from flashllm.tracing.base import PREAMBLE as TRACE_PREAMBLE
from flashllm.tracing.reader import read_trace
from flashllm.tracing.writer import TraceWriter

from .. import fits
from ..container_makers import Forger, make_container
from ..rwkv_models import exported, official, written
from ..test_checkpoints_llama2c import written as llama2c_written
from ..test_engine_snapshot import sealed as sealed_state
from ..test_tokenization_world import vocabulary
from ..tiny import GOLDEN, tokenizer_json

N_VALUES = 4096  # of the coded frames


@dataclass(frozen=True)
class Target:
    """`read(data, folder)` may write into the folder, which is its own."""

    seed: Callable[[], bytes]
    read: Callable[[bytes, Path], None]


TARGETS: dict[str, Target] = {}


def folder_of(name: str) -> str:
    """Of a target's inputs in the corpus."""
    return name.replace(" ", "-")


def target(name: str, seed: Callable[[], bytes]):
    def add(read: Callable[[bytes, Path], None]):
        TARGETS[name] = Target(functools.cache(seed), read)
        return read

    return add


def made(make: Callable[[Path], object], name: str) -> bytes:
    """The bytes of the file `name` that `make(folder)` leaves."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        return (Path(folder) / name).read_bytes()


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------------------- our own formats


def a_container() -> bytes:
    return made(lambda folder: make_container(folder / "m.flash"), "m.flash")


@functools.cache
def forger() -> Forger:
    with tempfile.TemporaryDirectory() as folder:
        return Forger(put(Path(folder), "m.flash", a_container()))


@target("container", a_container)
def _(data: bytes, folder: Path) -> None:
    verify(put(folder, "m.flash", data))


@target("container manifest", lambda: forger().manifest)
def _(data: bytes, folder: Path) -> None:
    forged = forger()
    before, forged.manifest = forged.manifest, data
    try:
        path = forged.seal(folder / "m.flash")
    finally:
        forged.manifest = before
    verify(path)


@target("container tables", lambda: bytes(forger().tables))
def _(data: bytes, folder: Path) -> None:
    forged = forger()
    before, forged.tables = forged.tables, bytearray(data)
    try:
        path = forged.seal(folder / "m.flash")
    finally:
        forged.tables = before
    verify(path)


def a_trace() -> bytes:
    layers = [LayerInfo("layers.0.ffn", 37, 8), LayerInfo("layers.1.ffn", 64, 8)]

    def write(folder: Path) -> None:
        rng = np.random.default_rng(0)
        with TraceWriter(folder / "t.fltrace", model="m", family="llama", text="t", text_name="n",
                         layers=layers) as writer:  # fmt: skip
            for i, layer in enumerate(layers):
                writer.add(i, rng.random((20, layer.n_bundles)) < 0.2)
            writer.commit()

    return made(write, "t.fltrace")


@target("trace", a_trace)
def _(data: bytes, folder: Path) -> None:
    trace = read_trace(put(folder, "t.fltrace", data))
    for layer in range(len(trace.layers)):
        trace.bits(layer)


def _trace_tail() -> tuple[list, bytes]:
    fields = list(TRACE_PREAMBLE.unpack_from(a_trace()))
    return fields, a_trace()[fields[4] :]


@target("trace tail", lambda: _trace_tail()[1])
def _(data: bytes, folder: Path) -> None:
    """Block table and manifest, under a preamble whose sums agree."""
    fields, _ = _trace_tail()
    tail = fields[4]
    n_table = min(fields[6] * BLOCK_ROW.itemsize, len(data))
    fields[3], fields[5], fields[7] = tail + len(data), len(data) - n_table, xxh64(data, tail)
    start = TRACE_PREAMBLE.pack(*fields)
    head = start + CHECKSUM.pack(xxh64(start))
    TARGETS["trace"].read(head + a_trace()[len(head) : tail] + data, folder)


@functools.cache
def kernels():
    return choose_kernels("serial", n_threads=1)


def a_fit() -> bytes:
    return made(lambda folder: fits.write(folder / "m.fit"), "m.fit")


@target("fit", a_fit)
def _(data: bytes, folder: Path) -> None:
    open_fit(put(folder, "m.fit", data)).load(kernels(), 0.9)


def _fit_manifest() -> bytes:
    return a_fit()[64 : 64 + FIT_PREAMBLE.unpack_from(a_fit())[4]]


@target("fit manifest", _fit_manifest)
def _(data: bytes, folder: Path) -> None:
    fields = list(FIT_PREAMBLE.unpack_from(a_fit()))
    sections = a_fit()[64 + -(-fields[4] // 64) * 64 :]
    body = data.ljust(-(-len(data) // 64) * 64, b"\0") + sections
    fields[3], fields[4], fields[6] = 64 + len(body), len(data), hashlib.sha256(data).digest()
    TARGETS["fit"].read(FIT_PREAMBLE.pack(*fields) + body, folder)


_HEADER = json.dumps({"model": "m", "length": 3, "pending": [1], "arrays": {"a": ["float32", 2]}})


@target("state", lambda: sealed_state(_HEADER.encode(), bytes(8)))
def _(data: bytes, folder: Path) -> None:
    Snapshot.load(put(folder, "s", data))


@target("state header", lambda: _HEADER.encode())
def _(data: bytes, folder: Path) -> None:
    Snapshot.load(put(folder, "s", sealed_state(data, bytes(8))))


@target("device curve", lambda: made(lambda f: DEFAULT_CURVE.save(f / "c.json"), "c.json"))
def _(data: bytes, folder: Path) -> None:
    DeviceCurve.load(put(folder, "c.json", data)).seconds(3, 5000)


_DENSITY = json.dumps({
    "densities": [0.3, 0.5], "layers": {"0": [0.2, 0.1], "1": [3, 1e-9]}, "model": "0" * 64,
    "n_tokens": 5, "text": "0" * 64, "version": 1,
})  # fmt: skip


@target("thresholds", lambda: _DENSITY.encode())
def _(data: bytes, folder: Path) -> None:
    read_magnitudes(put(folder, "m.density", data)).thresholds(0.3)


_TOKEN = {name: 1 for name in ("token", "ms", "at_s", "rss", *COUNTERS)} | {"parts_ms": {"ffn": 1}}
_RUN = [{"flashllm_run": 1, "model": "m", "ram_budget": 5}, _TOKEN, _TOKEN, {"result": {}}]


@target("journal", lambda: "\n".join(map(json.dumps, _RUN)).encode())
def _(data: bytes, folder: Path) -> None:
    as_csv(charts_of(put(folder, "run.jsonl", data)))


_RUNG = {"test": "tg1", "cap": "50%", "tokens_per_s": 2.0, "failed": "", "per_token_ms": {"ffn": 1},
         "floor_ms": {"dram": 1.0}, "bytes_per_token": 7, "hit_rate": 0.5, "facts": {},
         "cap_bytes": 9}  # fmt: skip


@target("ladder", lambda: json.dumps({"flashllm_bench": 1, "rows": [_RUNG, _RUNG]}).encode())
def _(data: bytes, folder: Path) -> None:
    as_csv(charts_of(put(folder, "bench.json", data)))


def _coded(name: str) -> bytes:
    values = np.random.default_rng(1).standard_normal(N_VALUES).astype(np.float16)
    return bytes(CODECS[name].encode(values.view(np.uint8)))


def _decoder(name: str):
    @target(f"codec {name}", lambda: _coded(name))
    def _(data: bytes, folder: Path) -> None:
        CODECS[name].decode_into(data, memoryview(bytearray(2 * N_VALUES)))


for _name in CODECS.names():
    _decoder(_name)

# ---------------------------------------------------------------------------------- checkpoints


def _rows(path: Path) -> None:
    """Open, resolve to a family where it is one, and read every tensor."""
    with open_source(path) as source:
        resolve(source)
        for name in source.names():
            source.rows(name, 0, source.shape(name)[0])


def _beside(variant: str, name: str, folder: Path, data: bytes) -> Path:
    """A copy of a golden checkpoint with one file replaced; copied once per folder."""
    copy = folder / variant
    if not copy.exists():
        shutil.copytree(GOLDEN / variant, copy)
    put(copy, name, data)
    return copy


@target("safetensors", lambda: (GOLDEN / "llama-relu/model.safetensors").read_bytes())
def _(data: bytes, folder: Path) -> None:
    _rows(_beside("llama-relu", "model.safetensors", folder, data))


@target("config", lambda: (GOLDEN / "llama-rope3/config.json").read_bytes())
def _(data: bytes, folder: Path) -> None:
    _rows(_beside("llama-rope3", "config.json", folder, data))


@target("shard index", lambda: (GOLDEN / "llama-sharded/model.safetensors.index.json").read_bytes())
def _(data: bytes, folder: Path) -> None:
    _rows(_beside("llama-sharded", "model.safetensors.index.json", folder, data))


def _rwkv(folder: Path) -> None:
    written(folder / "m.bin", exported(official("4"), "4"), half=True)


@target("rwkv.cpp", lambda: made(_rwkv, "m.bin"))
def _(data: bytes, folder: Path) -> None:
    _rows(put(folder, "m.bin", data))


@target("llama2.c", lambda: made(lambda f: llama2c_written(f, "llama-mha", 1), "model.bin"))
def _(data: bytes, folder: Path) -> None:
    with open_checkpoint(put(folder, "m.bin", data)) as source:
        for name in source.names():
            source.rows(name, 0, source.shape(name)[0])


# ----------------------------------------------------------------------------------- tokenizers


def _llama2c_tokens() -> bytes:
    words = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % n for n in range(8)), b" the", b"a"]
    return struct.pack("<i", 8) + b"".join(
        struct.pack("<fi", -float(i), len(word)) + word for i, word in enumerate(words)
    )


@target("llama2.c tokenizer", _llama2c_tokens)
def _(data: bytes, folder: Path) -> None:
    read_tokens(put(folder, "tokenizer.bin", data), 13)


@target("world vocabulary", vocabulary)
def _(data: bytes, folder: Path) -> None:
    tokenizer = WorldTokenizer.from_text(data)
    tokenizer.decode(tokenizer.encode("the abcd"))


@target("tokenizer.json", lambda: tokenizer_json().encode())
def _(data: bytes, folder: Path) -> None:
    tokenizer = Tokenizer.from_blobs({"tokenizer.json": data})
    tokenizer.decode(tokenizer.encode("the abcd"))


@target("tokenizer_config.json", lambda: b'{"add_bos_token": 1, "bos_token": {"content": "<s>"}}')
def _(data: bytes, folder: Path) -> None:
    blobs = {"tokenizer.json": tokenizer_json().encode(), "tokenizer_config.json": data}
    Tokenizer.from_blobs(blobs).encode("the abcd")
