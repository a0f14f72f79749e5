"""Files that lie: every one is refused with a typed error that names the place, within a second
and 16 MiB of memory (R-20 … R-22, R-31)."""

from __future__ import annotations

import json
import os
import socket

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashllm.container import open_container
from flashllm.container.base import FRAME_ROW
from flashllm.container.canonical import canonical_json
from flashllm.errors import FlashError, FlashReadError, FormatError, UnsupportedError

from . import cheap
from .container_makers import Forger, make_container

MIB = 2**20
HUGE = [2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.flash"
    make_container(path)
    return path


def refused(path, match: str, kind: type[FlashError] = FormatError) -> None:
    """Opening `path` must raise `kind` about `match`, fast and without taking memory."""
    error = cheap.refused(kind, lambda: open_container(path), match)
    assert len(str(error)) < 2000


def test_the_forger_changes_nothing_by_itself(good, tmp_path):
    assert Forger(good).seal(tmp_path / "x").read_bytes() == good.read_bytes()


# ------------------------------------------------------------------------------------ superblock

SUPERBLOCKS = [
    *[("index offset|index", dict(index_offset=n)) for n in (0, 1, 128, 16383, 16385, 2**63)],
    *[("index", dict(index_offset=n)) for n in (16384, 2**62, 2**64 - 16384)],
    *[("index bytes|index", dict(index_bytes=n)) for n in (0, 1, *HUGE)],
    *[("manifest bytes", dict(manifest_bytes=n)) for n in (0, 1, *HUGE)],
    *[("manifest", dict(manifest_bytes=n)) for n in (2, 100)],
    *[("file size|file bytes", dict(file_bytes=n)) for n in (0, 1, *HUGE)],
    *[("alignment", dict(alignment=n)) for n in (0, 1, 3, 256, 511, 8192, 2**31, 2**32 - 1)],
    *[("flags", dict(flags=n)) for n in (1, 2**63)],
    ("reserved", dict(reserved=1)),
    ("reserved", dict(spare=b"\0" * 15 + b"\1")),
    ("header bytes", dict(header_bytes=64)),
    ("sha256", dict(index_sha256=bytes(32))),
    ("magic", dict(magic=b"\x89FLASH\n\n")),
    ("magic", dict(magic=b"GGUF\3\0\0\0")),
]


@pytest.mark.parametrize("match, fields", SUPERBLOCKS)
def test_superblock(good, tmp_path, match, fields):
    path = Forger(good).seal(tmp_path / "x", **fields)
    refused(path, match)


@pytest.mark.parametrize("byte", [24, 31, 72, 103, 120, 127])
def test_superblock_checksum(good, tmp_path, byte):
    """File id, index hash, the checksum itself: a flip in what no other rule looks at."""
    raw = bytearray(good.read_bytes())
    raw[byte] ^= 1
    (tmp_path / "x").write_bytes(raw)
    refused(tmp_path / "x", "superblock checksum")


@pytest.mark.parametrize("version", [0, 2, 2**24, 2**32 - 1])
def test_other_versions_are_named(good, tmp_path, version):
    path = Forger(good).seal(tmp_path / "x", version=version)
    refused(path, f"version {version}; supported: 1", UnsupportedError)


def test_alignment_must_be_the_one_used(good, tmp_path):
    path = Forger(good).seal(tmp_path / "x", alignment=4096)
    refused(path, "frame 1 offset")


# -------------------------------------------------------------------------------------- manifest


def seal_manifest(good, tmp_path, change):
    """A file whose manifest went through `change`, sealed again; its tables stay."""
    forger = Forger(good)
    manifest = json.loads(forger.manifest)
    manifest = change(manifest) or manifest
    forger.manifest = manifest if isinstance(manifest, bytes) else canonical_json(manifest)
    return forger.seal(tmp_path / "x")


def at(*keys, value):
    """A change that sets manifest[keys...] = value."""

    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


def without(*keys):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return change


PLANE, FFN = ("planes", 0), ("planes", 2)
NUMBERS = [0, -1, 1.0, True, None, "1", [], *HUGE]
MANIFESTS = [
    *[("n_items", at(*PLANE, "n_items", value=n)) for n in NUMBERS],
    *[("per_frame", at(*PLANE, "per_frame", value=n)) for n in [*NUMBERS, 22]],
    *[("n_cols", at(*PLANE, "pieces", 0, "n_cols", value=n)) for n in [*NUMBERS, 2**24 + 1]],
    *[("offset", at(*FFN, "pieces", 1, "offset", value=n)) for n in [*NUMBERS, 47, 64]],
    *[("offset", at(*FFN, "offset", value=n)) for n in [*NUMBERS, 16384, 2**50]],
    *[("vectors", at("vectors", "bytes", value=n)) for n in [*NUMBERS, 4]],
    *[("vectors", at("vectors", "offset", value=n)) for n in NUMBERS],
    *[("length|vector", at("vectors", "tensors", 1, "length", value=n)) for n in NUMBERS],
    *[("offset", at("vectors", "tensors", 1, "offset", value=n)) for n in [*NUMBERS, 192 + 4]],
    *[("blob", at("blobs", 0, "bytes", value=n)) for n in [*NUMBERS, 2**26]],
    *[("blob", at("blobs", 1, "offset", value=n)) for n in NUMBERS],
    ("index", at(*PLANE, "n_items", value=2**31 - 1)),
    ("index", at(*PLANE, "n_items", value=20)),  # one frame less
    ("index", at(*PLANE, "per_frame", value=21)),
    ("item", at(*PLANE, "pieces", 0, value={"name": "row", "weight_type": "f32", "n_cols": 2**24,
                                            "offset": 1})),
    ("frames of at most", at(*PLANE, "pieces", 0, "n_cols", value=2**24)),
    ("item", lambda m: at(*PLANE, "per_frame", value=1)(m) or
     at(*FFN, "pieces", 1, "n_cols", value=2**24)(m)),
    ("'pla9es'", at(*PLANE, "codec", value="pla9es")),
    ("planes, zstd|zstd, planes", at(*PLANE, "codec", value="")),
    ("codec", at(*PLANE, "codec", value="x" * 1000)),
    ("codec", at(*FFN, "codec", value="planes")),  # int4 and f32
    ("'int5'", at(*PLANE, "pieces", 0, "weight_type", value="int5")),
    ("weight_type", at(*PLANE, "pieces", 0, "weight_type", value=3)),
    ("kind", at(*PLANE, "kind", value="columns")),
    ("pieces", at(*PLANE, "pieces", value=[])),
    ("pieces", at(*PLANE, "pieces", value={})),
    ("pieces", lambda m: m["planes"][0]["pieces"].append(m["planes"][0]["pieces"][0])),
    ("pieces", at(*PLANE, "pieces", 0, "name", value="up")),
    ("not used before", at(*FFN, "pieces", 1, "name", value="up")),
    ("name", at(*PLANE, "name", value="../embed")),
    ("name", at(*PLANE, "name", value="a" * 129)),
    ("name", at(*PLANE, "name", value="")),
    ("name", at(*PLANE, "name", value="embed\n")),
    ("name", at(*PLANE, "name", value="\u0430")),
    ("each name once", at("planes", 1, "name", value="embed")),
    ("each name once", at("vectors", "tensors", 1, "name", value="final_norm.weight")),
    ("each name once", at("blobs", 1, "name", value="tokenizer.json")),
    ("parts", at("planes", 1, "parts", value=[["q", 0, 16]])),
    ("parts", at("planes", 1, "parts", value=[["q", 0, 16], ["k", 15, 24]])),
    ("parts", at("planes", 1, "parts", value=[["q", 0, 16], ["q", 16, 24]])),
    ("parts", at("planes", 1, "parts", value=[["q", 0, 2**63]])),
    ("parts", at("planes", 1, "parts", value=[["q", 0]])),
    ("parts", at("planes", 1, "parts", value=[["q", 0, 0], ["k", 0, 24]])),
    ("blobs", at("blobs", 0, "name", value="../../etc/passwd")),
    ("blobs", at("blobs", 0, "name", value="/etc/passwd")),
    ("sha256", at("blobs", 0, "sha256", value="0" * 63)),
    ("digest", at("vectors", "digest", value="0" * 15)),
    ("family", at("family", value="Llama")),
    ("family", at("family", value=None)),
    ("config", at("config", value=[])),
    ("meta", at("meta", value="")),
    ("planes", at("planes", value={})),
    ("planes", at("planes", value=[None])),
    ("'surprise'", at("surprise", value=1)),
    ("'surprise'", at(*PLANE, "surprise", value=1)),
    ("'meta'", without("meta")),
    ("'codec'", without(*PLANE, "codec")),
    ("index", without("planes", 3)),
    ("offset|index", without("planes", 0)),
    ("vectors", at("vectors", value={"bytes": 0, "digest": "0" * 16, "offset": 0, "tensors": []})),
    ("blobs|offset|index", at("blobs", value=[])),
    ("nesting", at("config", value=json.loads("[" * 12 + "]" * 12))),
    ("64 bits", at("config", "n", value=2**64)),
    ("64 bits", at("config", "n", value=-(10**4000))),
]  # fmt: skip


@pytest.mark.parametrize("match, change", MANIFESTS)
def test_manifest(good, tmp_path, match, change):
    path = seal_manifest(good, tmp_path, change)
    refused(path, match)


def bracket(text: bytes):
    return lambda manifest: b'{"a":' + text + b"}"


SPELLINGS = {
    "white space": lambda m: json.dumps(m, sort_keys=True).encode(),
    "unsorted": lambda m: json.dumps(dict(reversed(m.items())), separators=(",", ":")).encode(),
    "trailing": lambda m: canonical_json(m) + b"\n",
    "byte order mark": lambda m: b"\xef\xbb\xbf" + canonical_json(m),
    "UTF-16": lambda m: json.dumps(m).encode("utf-16"),
    "not ASCII": lambda m: canonical_json(m).replace(b"llama", "ll\u00e4ma".encode()),
    "NUL": lambda m: canonical_json(m).replace(b"llama", b"lla\0ma"),
    "duplicate key": lambda m: canonical_json(m)[:-1] + b',"meta":{}}',
    "duplicate key inside": bracket(b'{"b":1,"b":1}'),
    "50,000 keys, the last twice": lambda m: (
        b"{" + b",".join(b'"%d":0' % i for i in range(50_000)) + b',"49999":0}'
    ),
    "a key of a megabyte twice": lambda m: b'{"%b":1,"%b":1}' % ((b"k" * (MIB // 2 - 100),) * 2),
    "NaN": bracket(b"NaN"),
    "Infinity": bracket(b"Infinity"),
    "infinity by size": bracket(b"1e999"),
    "-0 spelled 0.0e0": bracket(b"0.0e0"),
    "lone surrogate": bracket(b'"\\ud800"'),
    "5000 digits": bracket(b"9" * 5000),
    "not closed": lambda m: canonical_json(m)[:-1],
    "a list": lambda m: b"[]",
    "a number": lambda m: b"12",
    "depth 900": bracket(b"[" * 900 + b"]" * 900),
    "depth 10000": bracket(b"[" * 10_000 + b"]" * 10_000),
    "depth 500000": bracket(b"[" * 500_000 + b"]" * 500_000),
    "300,000 empty objects": bracket(b"[" + b"{}," * 300_000 + b"0]"),
    "100,000 numbers": bracket(b"[" + b"0.1," * 100_000 + b"0]"),
    "99,000 floats": bracket(b"[" + b"0.1234567," * 99_000 + b"0]"),
    "20,000 objects": bracket(b"[" + b'{"k":0.5},' * 19_990 + b"0]"),
    "99,000 texts": bracket(b"[" + b'"abcdefg",' * 99_000 + b"0]"),
    "a megabyte of text": bracket(b'"' + b"x" * (MIB - 100) + b'"'),
    "a megabyte of escapes": bracket(b'"' + b"\\u2603" * 174_000 + b'"'),
    "a key of a megabyte": lambda m: b'{"' + b"k" * (MIB - 100) + b'":1}',
    "a surrogate for every letter": bracket(b'"' + b"\\ud83d\\ude00" * 87_000 + b'"'),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_manifest_spelling(good, tmp_path, spelling):
    path = seal_manifest(good, tmp_path, SPELLINGS[spelling])
    refused(path, "manifest")


def test_manifest_of_more_than_its_limit(good, tmp_path):
    path = seal_manifest(good, tmp_path, bracket(b'"' + b"x" * MIB + b'"'))
    refused(path, "manifest bytes")


# ---------------------------------------------------------------------------------- frame tables


def seal_tables(good, tmp_path, row: int, column: str, value: int):
    forger = Forger(good)
    np.frombuffer(forger.tables, FRAME_ROW)[column][row] = value
    return forger.seal(tmp_path / "x")


@pytest.mark.parametrize("row", [0, 3, 6, 9, 12])
@pytest.mark.parametrize("shift", [1, -1, 512, -512, 16384, -16384, 2**40, 2**62, 2**63, -(2**63)])
def test_frame_offsets(good, tmp_path, row, shift):
    true = int(np.frombuffer(Forger(good).tables, FRAME_ROW)["offset"][row])
    path = seal_tables(good, tmp_path, row, "offset", (true + shift) % 2**64)
    refused(path, "plane .* frame .* offset")


@pytest.mark.parametrize("row", [0, 6, 8, 12])
@pytest.mark.parametrize("stored", [0, 641, 2**16, 2**31, 2**32 - 1])
def test_frame_stored(good, tmp_path, row, stored):
    path = seal_tables(good, tmp_path, row, "stored", stored)
    refused(path, "stored|offset")


def test_raw_frames_are_whole(good, tmp_path):
    """A shorter raw frame would leave the layout as it is."""
    path = seal_tables(good, tmp_path, 6, "stored", 639)
    refused(path, "plane layers.0.qkv frame 0 stored: expected 640 to 640")


@pytest.mark.parametrize("by", [1, 19, 20, 4096])
def test_ranges_beyond_the_file(good, tmp_path, by):
    """The body is cut under tables that stay: R-20 with every hash right."""
    forger = Forger(good)
    forger.body = forger.body[: -16384 * (1 + by // 4096)]
    refused(forger.seal(tmp_path / "x"), "index offset")
    forger = Forger(good)
    forger.tables += bytes(by)
    refused(forger.seal(tmp_path / "x"), "index: ")
    forger = Forger(good)
    del forger.tables[-by:]
    refused(forger.seal(tmp_path / "x"), "index: ")


def test_three_million_frames_that_are_not_there(good, tmp_path):
    """A table as large as may be, right hash and all, and wrong in its first row."""
    forger = Forger(good)
    manifest = json.loads(forger.manifest)
    n = (64 * MIB - MIB) // 20
    manifest["planes"] = [
        manifest["planes"][1] | {"n_items": n, "per_frame": 1, "parts": [], "offset": 16384}
    ]
    forger.manifest = canonical_json(manifest)
    forger.tables = bytearray(20 * n)
    path = forger.seal(tmp_path / "x")
    refused(path, "plane layers.0.qkv frame 0 stored")


def test_three_million_frames_wrong_at_the_end(good, tmp_path):
    forger = Forger(good)
    manifest = json.loads(forger.manifest)
    n = (64 * MIB - MIB) // 20
    manifest["planes"] = [
        manifest["planes"][1] | {"n_items": n, "per_frame": 1, "parts": [], "offset": 16384}
    ]
    rows = np.zeros(n, FRAME_ROW)
    rows["offset"], rows["stored"] = 16384 + 512 * np.arange(n), 80
    rows["stored"][-1] = 81
    forger.manifest, forger.tables = canonical_json(manifest), bytearray(rows.tobytes())
    path, sparse = forger.seal(tmp_path / "x"), 16384 * (16384 * 7)
    # The frames themselves need not be there for this to be refused, but the file must be so long.
    index = path.read_bytes()[len(forger.body) :]
    path = forger.seal(tmp_path / "x", index_offset=sparse, file_bytes=sparse + len(index))
    with open(path, "r+b") as file:
        file.truncate(len(forger.body))
        file.seek(sparse)
        file.write(index)
    refused(path, f"frame {n - 1} stored")


# --------------------------------------------------------------------------------- special files


@pytest.mark.parametrize("size", [0, 1, 7, 8, 127])
def test_short_files(good, tmp_path, size):
    path = tmp_path / "x"
    path.write_bytes(good.read_bytes()[:size])
    refused(path, "empty file|magic|superblock")


def test_trailing_bytes(good, tmp_path):
    for extra in (b"\0", b"\n", bytes(4096), bytes(16384)):
        path = tmp_path / "x"
        path.write_bytes(good.read_bytes() + extra)
        refused(path, "file size")


def test_fifo_socket_directory_device(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "a FIFO")
    refused(tmp_path, "a directory")
    refused("/dev/zero", "character device")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the whole path may be too long for a socket
        server.bind("socket")
        refused(tmp_path / "socket", "a regular file")


def test_links(good, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "right").symlink_to(good)
    for name in ("dangling", "loop", "missing"):
        refused(tmp_path / name, name, FlashReadError)
    open_container(tmp_path / "right").close()


def test_sparse_terabyte(good, tmp_path):
    path = tmp_path / "x"
    path.touch()
    os.truncate(path, 2**40)
    refused(path, "magic")
    forger = Forger(good)
    head = forger.seal(path, file_bytes=2**40, index_offset=2**40 - 2**26, index_bytes=2**26)
    os.truncate(head, 2**40)
    refused(path, "sha256")


# ------------------------------------------------------------------------------------------ fuzz


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_indexes_are_refused_or_mean_something(good, tmp_path_factory, data):
    """Sealed again after random damage, so that the seal is not what catches it."""
    forger = Forger(good)
    for _ in range(data.draw(st.integers(1, 3))):
        raw = bytearray(forger.manifest) if data.draw(st.booleans()) else forger.tables
        where = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["set", "delete", "insert", "digit"]))
        if kind == "set":
            raw[where] = data.draw(st.integers(0, 255))
        elif kind == "delete" and len(raw) > 20:
            del raw[where : where + data.draw(st.integers(1, 20))]
        elif kind == "insert":
            raw[where:where] = data.draw(st.binary(min_size=1, max_size=20))
        else:
            digits = [i for i, byte in enumerate(raw) if 48 <= byte <= 57]
            if digits:
                raw[data.draw(st.sampled_from(digits))] = data.draw(st.integers(48, 57))
        if raw is not forger.tables:
            forger.manifest = bytes(raw)
    path = forger.seal(tmp_path_factory.mktemp("fuzz") / "x")
    try:
        with open_container(path) as container:
            for plane in container.planes.values():
                assert int(plane.offsets[-1]) + int(plane.stored[-1]) <= container.size
                assert plane.problem() is None
    except (FormatError, UnsupportedError):
        pass
