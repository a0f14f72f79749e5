"""Files that were right once: every flip, every cut, every swap is noticed (R-25 … R-27)."""

from __future__ import annotations

import os

import numpy as np
import pytest
from flashllm._core import xxh64

from flashllm.container import ContainerWriter, open_container, verify
from flashllm.container.base import FRAME_ROW
from flashllm.container.verification import MAX_LISTED
from flashllm.errors import ChecksumError, FlashError, FlashReadError, FormatError

from .container_makers import Forger, make_container, make_items, write_plane

SMALL = [
    ("embed", "rows", [("row", "bf16", 48)], 5, 4, "planes", {}),
    ("layers.0.ffn", "bundles", [("up", "int4", 33), ("down", "f32", 3)], 4, 3, "raw", {}),
]


@pytest.fixture
def path(tmp_path):
    make_container(tmp_path / "small.flash", planes=SMALL)
    os.chmod(tmp_path / "small.flash", 0o644)
    return tmp_path / "small.flash"


def blocks(container) -> list[tuple[int, int]]:
    """(start, end) of everything that is not padding."""
    superblock, vectors = container.superblock, container.vectors_section
    found = [(0, 128), (superblock.index_offset, container.size)]
    found += [(vectors.offset, vectors.offset + vectors.n_bytes)]
    found += [(blob.offset, blob.offset + blob.n_bytes) for blob in container.blobs.values()]
    for plane in container.planes.values():
        for start, stored in zip(plane.offsets.tolist(), plane.stored.tolist(), strict=True):
            found.append((start, start + stored))
    return sorted(found)


def noticed(path) -> str:
    """How opening or verifying `path` says that it is damaged; "" if neither does."""
    try:
        found = verify(path)
    except FlashError as error:
        return str(error)
    return "" if found.ok else str(found.damage[0])


def test_every_flipped_byte_is_noticed(path):
    with open_container(path) as container:
        content = blocks(container)
        size = container.size
    offsets = [at for start, end in content for at in range(start, end)]
    padding = set(range(size)) - set(offsets)
    offsets += [
        at for at in padding if at % 251 == 0 or at - 1 not in padding or at + 1 not in padding
    ]
    raw = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for at in offsets:
            # One bit in turn, or all: a checksum must see either.
            flipped = raw[at] ^ (0xFF if at % 9 == 8 else 1 << at % 9)
            os.pwrite(file.fileno(), bytes([flipped]), at)
            assert noticed(path), f"byte {at}"
            os.pwrite(file.fileno(), raw[at : at + 1], at)
    assert not noticed(path)


def test_damage_is_named(path):
    with open_container(path) as container:
        plane, blob = container.planes["embed"], container.blobs["a"]
        places = {
            "plane embed frame 1": int(plane.offsets[1]),
            "vectors": container.vectors_section.offset + 3,
            "blob a": blob.offset + blob.n_bytes - 1,
            "padding": container.superblock.index_offset - 1,
        }
    with open(path, "r+b") as file:
        for at in places.values():
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 4]))
    found = verify(path)
    assert [damage.where for damage in found.damage] == list(places) and found.n_damaged == 4
    for damage, at in zip(found.damage, places.values(), strict=True):
        assert damage.offset <= at < damage.offset + damage.n_bytes
    with open_container(path) as container:
        with pytest.raises(ChecksumError, match="vectors"):
            container.load_vectors()
        with pytest.raises(FormatError, match="blob a.*sha256"):
            container.read_blob("a")
        assert container.read_blob("tokenizer.json")


def test_every_truncation_is_noticed_at_open(tmp_path):
    path = tmp_path / "x.flash"
    with ContainerWriter(path, family="llama", config={}) as writer:
        write_plane(writer, SMALL[1], make_items(SMALL[1][2], SMALL[1][3]))
        writer.commit()
    size = path.stat().st_size
    fd = os.open(path, os.O_RDWR)
    try:
        for length in reversed(range(size)):
            os.ftruncate(fd, length)
            with pytest.raises(FormatError):
                open_container(path)
    finally:
        os.close(fd)


def test_every_truncation_is_noticed_though_the_size_is_forged(path, tmp_path):
    """Even sealed again with the size that is left, a file whose end is missing does not open."""
    forger = Forger(path)
    whole = forger.body
    for at in range(16384, len(whole), 16384):
        forger.body = whole[:at]
        with pytest.raises(FormatError, match="offset"):
            open_container(forger.seal(tmp_path / "x"))


def test_frames_swapped_within_a_file(path):
    with open_container(path) as container:
        plane = container.planes["layers.0.ffn"]
    (a, b), n = plane.offsets.tolist(), int(plane.stored[0])
    raw = bytearray(path.read_bytes())
    raw[a : a + n], raw[b : b + n] = raw[b : b + n], raw[a : a + n]
    path.write_bytes(raw)
    where = [damage.where for damage in verify(path).damage]
    assert where == ["plane layers.0.ffn frame 0", "plane layers.0.ffn frame 1"]


def test_frames_swapped_with_their_digests(path, tmp_path):
    """Right digests of right bytes in the wrong place: the seed catches what sealing cannot."""
    forger = Forger(path)
    rows = np.frombuffer(forger.tables, FRAME_ROW)
    body = bytearray(forger.body)
    (a, n, _), (b, m, _) = rows[2].tolist(), rows[3].tolist()
    assert n == m
    body[a : a + n], body[b : b + n] = body[b : b + n], body[a : a + n]
    rows["digest"][[2, 3]] = rows["digest"][[3, 2]]
    forger.body = bytes(body)
    where = [damage.where for damage in verify(forger.seal(tmp_path / "x")).damage]
    assert where == ["plane layers.0.ffn frame 0", "plane layers.0.ffn frame 1"]


def test_frames_of_another_file_with_their_digests(path, tmp_path):
    """The same weights converted from another source: same layout, same frames, other file id."""
    make_container(tmp_path / "other.flash", planes=SMALL, source="another")
    forger, other = Forger(path), Forger(tmp_path / "other.flash")
    rows, rows_of_other = (np.frombuffer(f.tables, FRAME_ROW) for f in (forger, other))
    assert (rows["offset"] == rows_of_other["offset"]).all()
    assert (rows["digest"] != rows_of_other["digest"]).all()
    rows["digest"][2] = rows_of_other["digest"][2]
    where = [damage.where for damage in verify(forger.seal(tmp_path / "x")).damage]
    assert where == ["plane layers.0.ffn frame 0"]


def test_frames_that_do_not_decode_are_damage(path, tmp_path):
    """Right digest, wrong content: a writer with a fault."""
    forger = Forger(path)
    rows = np.frombuffer(forger.tables, FRAME_ROW)
    body = bytearray(forger.body)
    for row in (0, 3):  # a coded frame, and the tail of a last frame that must be zero
        offset, stored, _ = rows[row].tolist()
        body[offset + stored - 1] ^= 1
        if row == 0:
            body[offset : offset + 4] = b"junk"
        seed = (forger.superblock.file_id + offset) % 2**64
        rows[row] = (offset, stored, xxh64(bytes(body[offset : offset + stored]), seed))
    forger.body = bytes(body)
    found = verify(forger.seal(tmp_path / "x"))
    assert [damage.where for damage in found.damage] == [
        "plane embed frame 0",
        "plane layers.0.ffn frame 1",
    ]
    assert "zstd" in found.damage[0].what and "last item" in found.damage[1].what


def test_gaps_between_pieces_are_zero(path, tmp_path):
    forger = Forger(path)
    rows = np.frombuffer(forger.tables, FRAME_ROW)
    body = bytearray(forger.body)
    offset, stored, _ = rows[2].tolist()
    body[offset + 36] = 1  # int4 rows of 33 columns take 36 bytes, the next piece is at 48
    seed = (forger.superblock.file_id + offset) % 2**64
    rows[2] = (offset, stored, xxh64(bytes(body[offset : offset + stored]), seed))
    forger.body = bytes(body)
    (damage,) = verify(forger.seal(tmp_path / "x")).damage
    assert "between pieces" in damage.what


def test_vectors_are_finite(path, tmp_path):
    forger = Forger(path)
    with open_container(path) as container:
        section = container.vectors_section
    body = bytearray(forger.body)
    body[section.offset : section.offset + 4] = np.float32(np.inf).tobytes()
    data = bytes(body[section.offset : section.offset + section.n_bytes])
    digest = xxh64(data, (forger.superblock.file_id + section.offset) % 2**64)
    forger.body = bytes(body)
    true = b"%016x" % section.digest
    forger.manifest = forger.manifest.replace(true, b"%016x" % digest)
    with (
        open_container(forger.seal(tmp_path / "x")) as container,
        pytest.raises(FormatError, match="final_norm.weight: expected finite"),
    ):
        container.load_vectors()


def test_only_the_first_thousand_are_listed(tmp_path):
    plane = ("embed", "rows", [("row", "int8", 32)], MAX_LISTED + 5, 1, "raw", {})
    make_container(tmp_path / "x.flash", planes=[plane])
    os.chmod(tmp_path / "x.flash", 0o644)
    with open_container(tmp_path / "x.flash") as container:
        offsets = container.planes["embed"].offsets.tolist()
    with open(tmp_path / "x.flash", "r+b") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(b"\xff" * 34)
    found = verify(tmp_path / "x.flash")
    assert found.n_damaged == MAX_LISTED + 5 and len(found.damage) == MAX_LISTED


def test_file_cut_after_it_was_opened(path):
    with open_container(path) as container:
        os.truncate(path, 16384)
        with pytest.raises(FlashReadError, match="ends .* early"):
            container.load_vectors()
        with open(path, "rb") as file, pytest.raises(FlashReadError, match="replaced or changed"):
            container.check_same_file(file.fileno())


def test_file_rewritten_after_it_was_opened(path):
    with open_container(path) as container:
        os.utime(path, ns=(0, 0))
        with open(path, "rb") as file, pytest.raises(FlashReadError, match="changed"):
            container.check_same_file(file.fileno())


def test_file_replaced_after_it_was_opened(path, tmp_path):
    with open_container(path) as container:
        with open(path, "rb") as file:
            container.check_same_file(file.fileno())
        make_container(tmp_path / "other.flash", planes=SMALL, source="another")
        os.replace(tmp_path / "other.flash", path)
        with open(path, "rb") as file, pytest.raises(FlashReadError, match="replaced"):
            container.check_same_file(file.fileno())
        assert container.load_vectors()  # from the file that was opened


def test_unreadable_blocks_are_damage(path, monkeypatch):
    from flashllm.container import verification

    with open_container(path) as container:
        bad = int(container.planes["embed"].offsets[1])
    read = verification.read_exactly

    def failing(fd, path, offset, n_bytes, where):
        if offset <= bad < offset + n_bytes:
            raise FlashReadError(5, "Input/output error", path, offset, where)
        return read(fd, path, offset, n_bytes, where)

    monkeypatch.setattr(verification, "read_exactly", failing)
    found = verify(path)
    assert [str(damage) for damage in found.damage] == [
        f"plane embed frame 1 (bytes {bad} to {bad + found.damage[0].n_bytes}): "
        "cannot be read: Input/output error"
    ]
    assert found.sha256 is None


def test_progress_ends_at_the_size(path):
    seen = []
    found = verify(path, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (found.size, found.size) and found.n_frames == 4
