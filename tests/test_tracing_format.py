"""Traces: round trip against what was put in, statistics against a slow version, hostile files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flashllm._core import xxh64

from flashllm.errors import ChecksumError, FlashError, FormatError, UnsupportedError, UsageError
from flashllm.tracing import LayerInfo, TraceWriter, read_trace, statistics
from flashllm.tracing.base import BLOCK_ROW, CHECKSUM, PREAMBLE, PREAMBLE_BYTES
from flashllm.tracing.statistics import SPANS, UNION

from .cheap import refused

LAYERS = [LayerInfo("layers.0.ffn", 37, 208), LayerInfo("layers.2.ffn", 64, 208)]


def make_bits(n_tokens: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random((n_tokens, layer.n_bundles)) < 0.2 for layer in LAYERS]


def write(path, bits, *, starts=(0,), group=16, cuts=(5, 6, 30)):
    """Write in chunks cut at `cuts`, as a prompt would come."""
    n_tokens = len(bits[0])
    edges = sorted({0, n_tokens, *(c for c in (*cuts, *starts) if c < n_tokens)})
    with TraceWriter(path, model="ab" * 32, family="llama", text="cd" * 32, text_name="a text",
                     layers=LAYERS, group_tokens=group) as writer:  # fmt: skip
        for a, b in zip(edges, edges[1:], strict=False):
            if a in starts:
                writer.begin_context()
            for layer, one in enumerate(bits):
                writer.add(layer, np.where(one[a:b], 0.5, -1.0).astype(np.float32))
        writer.commit()
    return path


@pytest.mark.parametrize("n_tokens", [1, 7, 8, 16, 17, 47, 48])
def test_round_trip(tmp_path, n_tokens):
    bits = make_bits(n_tokens)
    trace = read_trace(write(tmp_path / "t.fltrace", bits, starts=(0, 20)))
    assert (trace.n_tokens, trace.family, trace.text_name) == (n_tokens, "llama", "a text")
    assert trace.model == "ab" * 32 and list(trace.layers) == LAYERS
    assert trace.starts.tolist() == ([0, 20] if n_tokens > 20 else [0])
    for layer, expected in enumerate(bits):
        assert (trace.bits(layer) == expected).all()
        assert (trace.bits(layer, 3) == expected[:3]).all()
        first, ids = trace.active(layer)
        assert [ids[a:b].tolist() for a, b in zip(first, first[1:], strict=False)] == [
            np.flatnonzero(row).tolist() for row in expected
        ]


def test_bytes_do_not_depend_on_the_chunks(tmp_path):
    bits = make_bits(50)
    a = write(tmp_path / "a.fltrace", bits, cuts=(3, 40)).read_bytes()
    assert write(tmp_path / "b.fltrace", bits, cuts=()).read_bytes()[:-400] != b""
    # blocks may lie in another order, but what they say is the same
    x, y = read_trace(tmp_path / "a.fltrace"), read_trace(tmp_path / "b.fltrace")
    assert all((x.bits(i) == y.bits(i)).all() for i in range(2))
    assert a == write(tmp_path / "c.fltrace", bits, cuts=(3, 40)).read_bytes()


def test_statistics_equal_the_slow_version(tmp_path):
    bits, starts = make_bits(60, seed=3), (0, 25)
    rows = statistics(read_trace(write(tmp_path / "t.fltrace", bits, starts=starts)))
    for row, one in zip(rows, bits, strict=True):
        n_tokens, n = one.shape
        for s, span in enumerate(SPANS):
            hits = asked = 0
            for t in range(n_tokens):
                if t - max(x for x in starts if x <= t) >= span:
                    hits += int((one[t] & one[t - span : t].any(axis=0)).sum())
                    asked += int(one[t].sum())
            assert row.reuse[s] == pytest.approx(hits / asked)
        p = one.mean(axis=0)
        assert row.chance[0] == pytest.approx((p * p).sum() / p.sum())
        spans = [one[t : t + UNION] for t in range(n_tokens - UNION + 1)
                 if not t < starts[1] < t + UNION]  # fmt: skip
        assert row.union == pytest.approx(np.mean([x.any(axis=0).mean() for x in spans]))
        assert row.active == pytest.approx(one.mean())
        assert row.never == pytest.approx(np.mean(~one.any(axis=0)))


def test_an_unfinished_trace_leaves_nothing(tmp_path):
    with TraceWriter(tmp_path / "t.fltrace", model="", family="llama", text="", text_name="",
                     layers=LAYERS) as writer:  # fmt: skip
        writer.add(0, np.ones((3, 37), bool))
        with pytest.raises(UsageError, match="have seen"):
            writer.commit()
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- hostile files


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    return write(tmp_path_factory.mktemp("good") / "t.fltrace", make_bits(20)).read_bytes()


def read_all(path):
    trace = read_trace(path)
    return [trace.bits(layer) for layer in range(len(trace.layers))]


def test_every_truncation_is_found(good, tmp_path):
    path = tmp_path / "t.fltrace"
    for n in range(len(good)):
        path.write_bytes(good[:n])
        with pytest.raises(FormatError):
            read_all(path)


def test_every_flipped_byte_is_found(good, tmp_path):
    path = tmp_path / "t.fltrace"
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x40]) + good[at + 1 :])
        with pytest.raises((FormatError, UnsupportedError)):
            read_all(path)


def sealed(good: bytes, *, manifest=None, table=None, head=None) -> bytes:
    """`good` with parts replaced and every checksum made right again."""
    fields = list(PREAMBLE.unpack_from(good))
    tail, n_manifest, n_rows = fields[4], fields[5], fields[6]
    old_table = np.frombuffer(good, BLOCK_ROW, n_rows, tail).copy()
    old = json.loads(good[-n_manifest:])
    if table:
        table(old_table)
    if manifest:
        manifest(old)
    text = json.dumps(old, sort_keys=True, separators=(",", ":")).encode()
    end = old_table.tobytes() + text
    fields[3], fields[5], fields[7] = tail + len(end), len(text), xxh64(end, tail)
    if head:
        head(fields)
    start = PREAMBLE.pack(*fields)
    return start + CHECKSUM.pack(xxh64(start)) + good[PREAMBLE_BYTES:tail] + end


def put(key, value):
    return lambda manifest: manifest.__setitem__(key, value)


def set_row(name, value):
    return lambda table: table.__setitem__(name, value)


HOSTILE = {
    "version": ({"head": lambda f: f.__setitem__(1, 2)}, UnsupportedError, "version 2"),
    "flags": ({"head": lambda f: f.__setitem__(2, 1)}, FormatError, "flags"),
    "rows": ({"head": lambda f: f.__setitem__(6, 2**32 - 1)}, FormatError, "table rows"),
    "tail": ({"head": lambda f: f.__setitem__(4, 2**63)}, FormatError, "tail"),
    "tail sum": ({"head": lambda f: f.__setitem__(7, 1)}, ChecksumError, "tail"),
    "size": ({"head": lambda f: f.__setitem__(3, 10)}, FormatError, "file bytes"),
    "tokens": ({"manifest": put("n_tokens", 2**28)}, FormatError, "blocks"),
    "many tokens": ({"manifest": put("n_tokens", 2**62)}, FormatError, "n_tokens"),
    "few tokens": ({"manifest": put("n_tokens", 19)}, FormatError, "tokens of blocks"),
    "float tokens": ({"manifest": put("n_tokens", 20.0)}, FormatError, "n_tokens"),
    "group": ({"manifest": put("group_tokens", 0)}, FormatError, "group_tokens"),
    "bool": ({"manifest": put("group_tokens", True)}, FormatError, "group_tokens"),
    "bundles": ({"manifest": put("layers", [["a", 2**40, 1]] * 2)}, FormatError, "bundles"),
    "all bundles": ({"manifest": put("layers", [["a", 2**24, 1]] * 17)}, FormatError, "all layers"),
    "wide": ({"manifest": put("layers", [["a", 41, 1], ["b", 64, 1]])}, FormatError, "zstd"),
    "beyond": ({"manifest": put("layers", [["a", 33, 1], ["b", 64, 1]])}, FormatError, "beyond"),
    "layer row": ({"manifest": put("layers", [["a", 1], ["b", 1]])}, FormatError, "layers"),
    "no layer": ({"manifest": put("layers", [])}, FormatError, "layers"),
    "starts": ({"manifest": put("starts", [0, 9, 9])}, FormatError, "starts"),
    "late start": ({"manifest": put("starts", [1])}, FormatError, "starts"),
    "no start": ({"manifest": put("starts", [])}, FormatError, "starts"),
    "extra key": ({"manifest": put("more", 1)}, FormatError, "manifest"),
    "brackets": ({"manifest": put("starts", [[]] * 9000)}, FormatError, "brackets"),
    "layer": ({"table": set_row("layer", 2**31)}, FormatError, "layer"),
    "one layer": ({"table": set_row("layer", 0)}, FormatError, "blocks"),
    "overlap": ({"table": set_row("offset", 64)}, FormatError, "blocks"),
    "stored": ({"table": set_row("stored", 2**31)}, FormatError, "blocks"),
    "block sum": ({"table": set_row("digest", 0)}, ChecksumError, "block at"),
    "zero": ({"table": set_row("zero", 1)}, FormatError, "block table"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_well_sealed_lies_are_refused(good, tmp_path, name):
    change, error, said = HOSTILE[name]
    path = tmp_path / "t.fltrace"
    path.write_bytes(sealed(good, **change))
    refused(error, lambda: read_all(path), said)
    path.write_bytes(sealed(good))
    read_all(path)  # the sealing itself is right


def test_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent", tmp_path / "empty"):
        if path.name == "empty":
            path.touch()
        with pytest.raises(FlashError):
            read_trace(path)
