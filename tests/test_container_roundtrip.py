"""What is written is what is read: planes, vectors, blobs, at every alignment and chunking."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashllm.codecs import CODECS
from flashllm.container import ContainerWriter, lay_out_pieces, open_container, verify
from flashllm.errors import ClosedError, UsageError
from flashllm.quant import WEIGHT_TYPES

from .container_makers import (
    BLOBS,
    CONFIG,
    PLANES,
    VECTORS,
    make_container,
    make_items,
    read_plane,
    write_plane,
)


@pytest.mark.parametrize("alignment", [512, 4096, 16384])
def test_everything_comes_back(tmp_path, alignment):
    path = tmp_path / "model.flash"
    items = make_container(path, alignment=alignment)
    with open_container(path) as container:
        assert container.family == "llama" and container.config == CONFIG
        assert container.size == path.stat().st_size
        assert list(container.planes) == [plane[0] for plane in PLANES]
        for plane in container.planes.values():
            found = read_plane(container, plane)
            np.testing.assert_array_equal(found[: plane.n_items], items[plane.name])
            assert not found[plane.n_items :].any()
            assert not (plane.offsets % np.uint64(alignment)).any()
        loaded = container.load_vectors()
        assert list(loaded) == list(VECTORS) == list(container.vectors)
        for name, values in VECTORS.items():
            np.testing.assert_array_equal(loaded[name], values)
            assert container.vectors[name][0] == values.shape
        assert {name: container.read_blob(name) for name in container.blobs} == BLOBS
    assert verify(path).ok
    assert [file.name for file in tmp_path.iterdir()] == ["model.flash"]
    assert path.stat().st_mode & 0o222 == 0


def test_plane_geometry(tmp_path):
    make_container(tmp_path / "model.flash")
    with open_container(tmp_path / "model.flash") as container:
        ffn = container.planes["layers.0.ffn"]
        assert (ffn.kind, ffn.n_items, ffn.per_frame, ffn.n_frames) == ("bundles", 19, 5, 4)
        assert ffn.piece("up").row_bytes == 36 and ffn.piece("down").offset == 48
        assert ffn.gaps == ((36, 48), (60, 64)) and container.planes["embed"].gaps == ()
        assert ffn.stride == 64 and ffn.frame_bytes == 320
        assert [ffn.n_items_in(frame) for frame in range(4)] == [5, 5, 5, 4]
        qkv = container.planes["layers.0.qkv"]
        assert qkv.parts == {"q": (0, 16), "k": (16, 24)}
        assert (np.diff(qkv.offsets.astype(np.int64)) == 1024).all()  # 8 * 80 in steps of 512
        assert qkv.seeds().tolist() == [qkv.seed(frame) for frame in range(qkv.n_frames)]
        with pytest.raises(KeyError):
            ffn.piece("gate")
        with pytest.raises(ValueError):
            ffn.offsets[0] = 0


def test_seeds_wrap(tmp_path):
    make_container(tmp_path / "model.flash")
    with open_container(tmp_path / "model.flash") as container:
        plane = container.planes["embed"]
        object.__setattr__(plane, "file_id", 2**64 - 1)
        assert plane.seeds().tolist() == [plane.seed(i) for i in range(plane.n_frames)]
        assert plane.seed(0) == int(plane.offsets[0]) - 1


def test_same_input_same_bytes_other_input_other_id(tmp_path):
    for name, source in (("a", "one"), ("b", "one"), ("c", "two")):
        make_container(tmp_path / f"{name}.flash", source=source)
    a, b, c = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert a == b != c
    make_container(tmp_path / "d.flash", source="one", options={"quant": "int8"})
    ids = []
    for name in "acd":
        with open_container(tmp_path / f"{name}.flash") as container:
            ids.append(container.file_id)
    assert len(set(ids)) == 3


@pytest.mark.parametrize("step", [1, 3, 4, 5, 20, 21])
def test_chunking_of_writes_changes_nothing(tmp_path, step):
    plane = PLANES[0]
    items = make_items(plane[2], plane[3])
    for name, chunk in (("whole", 1000), ("cut", step)):
        with ContainerWriter(tmp_path / name, family="opt", config={}) as writer:
            write_plane(writer, plane, items, step=chunk)
            writer.commit()
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()


def test_empty_container(tmp_path):
    with ContainerWriter(tmp_path / "empty.flash", family="opt", config={}) as writer:
        writer.commit()
    with open_container(tmp_path / "empty.flash") as container:
        assert not container.planes and not container.load_vectors() and not container.blobs
    assert verify(tmp_path / "empty.flash").ok


def test_summary_is_json(tmp_path):
    make_container(tmp_path / "model.flash", meta={"codec": "raw: flash is fast"})
    with open_container(tmp_path / "model.flash") as container:
        summary = json.loads(json.dumps(container.summary()))
    assert summary["meta"] == {"codec": "raw: flash is fast"}
    assert [plane["name"] for plane in summary["planes"]] == [plane[0] for plane in PLANES]
    assert summary["planes"][2]["pieces"] == {"up": "int4[33]", "down": "f32[3]"}


def test_closed_container(tmp_path):
    make_container(tmp_path / "model.flash")
    container = open_container(tmp_path / "model.flash")
    container.close()
    container.close()
    with pytest.raises(ClosedError):
        container.load_vectors()


def test_unknown_blob_lists_the_known(tmp_path):
    make_container(tmp_path / "model.flash")
    with (
        open_container(tmp_path / "model.flash") as container,
        pytest.raises(UsageError, match="tokenizer.json"),
    ):
        container.read_blob("vocab.txt")


@st.composite
def planes(draw):
    kind = draw(st.sampled_from(["rows", "bundles"]))
    types = st.sampled_from(list(WEIGHT_TYPES))
    n_pieces = 1 if kind == "rows" else draw(st.integers(1, 4))
    names = ["row"] if kind == "rows" else [f"p{i}" for i in range(n_pieces)]
    pieces = [(name, draw(types), draw(st.integers(1, 70))) for name in names]
    n_items = draw(st.integers(1, 40))
    codec = draw(st.sampled_from([c for c in CODECS if CODECS[c].accepts([p[1] for p in pieces])]))
    return kind, pieces, n_items, draw(st.integers(1, n_items)), codec


@settings(max_examples=40, deadline=None)
@given(st.lists(planes(), min_size=1, max_size=4), st.sampled_from([512, 4096, 16384]), st.data())
def test_any_planes_come_back_bit_exactly(tmp_path_factory, drawn, alignment, data):
    path = tmp_path_factory.mktemp("any") / "any.flash"
    contents = {}
    with ContainerWriter(path, family="llama", config={}, alignment=alignment) as writer:
        for i, (kind, pieces, n_items, per_frame, codec) in enumerate(drawn):
            name = f"plane.{i}"
            contents[name] = make_items(pieces, n_items, seed=data.draw(st.integers(0, 99)))
            plane = (name, kind, pieces, n_items, per_frame, codec, {})
            write_plane(writer, plane, contents[name], step=data.draw(st.integers(1, 41)))
        writer.commit()
    with open_container(path) as container:
        for name, items in contents.items():
            plane = container.planes[name]
            np.testing.assert_array_equal(read_plane(container, plane)[: plane.n_items], items)
    assert verify(path).ok


BAD_PLANES = [
    ("name", dict(name="Embed")),
    ("name", dict(name="a..b")),
    ("kind", dict(kind="columns")),
    ("codec", dict(codec="lz9")),
    ("codec", dict(codec="planes")),
    ("n_items", dict(n_items=0)),
    ("n_items", dict(n_items=2**31)),
    ("per_frame", dict(per_frame=0)),
    ("per_frame", dict(per_frame=11)),
    ("per_frame", dict(pieces=lay_out_pieces([("row", "f32", 2**18)]), per_frame=2)),
    ("pieces", dict(pieces=())),
    ("pieces", dict(pieces=lay_out_pieces([("gate", "f32", 4)]))),
    ("parts", dict(parts={"q": (0, 5)})),
    ("parts", dict(parts={"q": (0, 5), "k": (6, 10)})),
]


@pytest.mark.parametrize("where, change", BAD_PLANES)
def test_writer_refuses_what_the_reader_would(tmp_path, where, change):
    plane = dict(
        name="embed", kind="rows", pieces=lay_out_pieces([("row", "int8", 32)]), n_items=10,
        per_frame=2, codec="raw",
    )  # fmt: skip
    with (
        ContainerWriter(tmp_path / "x.flash", family="opt", config={}) as writer,
        pytest.raises(UsageError, match=where),
    ):
        writer.begin_plane(**(plane | change))


def test_writer_misuse(tmp_path):
    path = tmp_path / "x.flash"
    row = lay_out_pieces([("row", "int8", 32)])
    with ContainerWriter(path, family="opt", config={}) as writer:
        with pytest.raises(UsageError, match="without a plane"):
            writer.write_items(np.zeros((1, 48), np.uint8))
        writer.begin_plane("a", "rows", row, n_items=3, per_frame=2)
        with pytest.raises(UsageError, match="not ended"):
            writer.begin_plane("b", "rows", row, n_items=3, per_frame=2)
        for wrong in (np.zeros((1, 47), np.uint8), np.zeros((1, 48), np.int8), np.zeros(48, "u1")):
            with pytest.raises(UsageError, match="uint8"):
                writer.write_items(wrong)
        writer.write_items(np.zeros((2, 48), np.uint8))
        with pytest.raises(UsageError, match="between pieces"):
            writer.write_items(np.ones((1, 48), np.uint8))
        with pytest.raises(UsageError, match="2 of 3 items"):
            writer.end_plane()
        with pytest.raises(UsageError, match="has 3 items, not 4"):
            writer.write_items(np.zeros((2, 48), np.uint8))
        with pytest.raises(UsageError, match="not ended"):
            writer.commit()
        writer.write_items(np.zeros((1, 48), np.uint8))
        writer.end_plane()
        with pytest.raises(UsageError, match="already"):
            writer.begin_plane("a", "rows", row, n_items=3, per_frame=2)
        with pytest.raises(UsageError, match="one dimension"):
            writer.add_vectors({"v": np.zeros((2, 2))})
        with pytest.raises(UsageError, match="inf or nan"):
            writer.add_vectors({"v": np.array([np.nan])})
        for name in ("../up", "", ".hidden", "a/b"):
            with pytest.raises(UsageError, match="bad name"):
                writer.add_blob(name, b"")
        writer.commit()
        with pytest.raises(UsageError, match="closed"):
            writer.add_blob("a", b"")
    with pytest.raises(UsageError, match="exists"):
        ContainerWriter(path, family="opt", config={})
    with pytest.raises(ValueError):
        ContainerWriter(tmp_path / "y.flash", family="opt", config={"eps": float("nan")})
    with ContainerWriter(path, family="opt", config={"n": 2}, overwrite=True) as writer:
        writer.commit()
    with open_container(path) as container:
        assert container.config == {"n": 2}
