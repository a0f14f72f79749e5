"""Version 1 for ever: the committed files stay readable and are written again byte for byte."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import zstandard

from flashllm.container import open_container, verify

from .container_makers import read_plane
from .golden.make_container_golden import CODED, CONFIG, GOLDEN, RAW, golden_path, items_of

SHA256 = {
    "raw": "87fe0bed0b2f3bb084a0deb7ce04c51f3b17aa6bdc42a42e8d86b411be904829",
    "coded": "797cafb55ca1b9c314d0fb658705deaa527f88d363d373641d20b742ff99beb7",
    "carried": "cd7c5186f00e2bcffe63d97c7409780390ccc7a91629ee884dd2d6ce504c4917",
}
# What coded the golden file; another zstd may find a shorter form of the same frame.
GOLDEN_ZSTD = (1, 5, 7)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_committed_file_is_the_one_meant(name):
    raw = golden_path(name).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == SHA256[name]
    assert len(raw) < 65536


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_verify(name):
    found = verify(golden_path(name))
    assert found.ok and found.sha256 == SHA256[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_are_written_again(tmp_path, name):
    if name == "coded" and zstandard.ZSTD_VERSION != GOLDEN_ZSTD:
        pytest.skip("coded by another zstd")
    GOLDEN[name](tmp_path / "again.flash")
    assert (tmp_path / "again.flash").read_bytes() == golden_path(name).read_bytes()


@pytest.mark.parametrize("name, planes", [("raw", RAW), ("coded", CODED)])
def test_golden_planes(name, planes):
    with open_container(golden_path(name)) as container:
        assert list(container.planes) == [plane[0] for plane in planes]
        for plane in planes:
            read = container.planes[plane[0]]
            assert (read.kind, read.codec) == (plane[1], plane[5])
            assert (read.n_items, read.per_frame, read.parts) == (plane[3], plane[4], plane[6])
            items = items_of(plane[2], plane[3])
            np.testing.assert_array_equal(read_plane(container, read)[: plane[3]], items)


def test_golden_superblock_by_hand():
    """Read without our code, so that a change of both sides is noticed."""
    raw = golden_path("raw").read_bytes()
    assert raw[:8] == b"\x89FLASH\r\n"
    version, header_bytes, flags, file_id, file_bytes = struct.unpack_from("<IIQQQ", raw, 8)
    assert (version, header_bytes, flags, file_bytes) == (1, 128, 0, len(raw))
    source = b'{"options":{},"source":"golden"}'
    assert file_id == int.from_bytes(hashlib.sha256(source).digest()[:8], "little")
    alignment, _, index, index_bytes, manifest_bytes = struct.unpack_from("<IIQQQ", raw, 40)
    assert (alignment, index, index + index_bytes) == (512, 49152, len(raw))
    assert raw[72:104] == hashlib.sha256(raw[index:]).digest()
    assert not any(raw[128:16384])
    manifest = raw[index : index + manifest_bytes]
    assert manifest.startswith(b'{"blobs":[],"config":{"hidden_size":64,"norm_eps":1e-05,')
    table = raw[index + manifest_bytes :]
    assert len(table) == (3 + 5) * 20
    # 16 items of 48 bytes (36 of int4, rounded up to 16) in steps of 512.
    assert struct.unpack_from("<QI", table, 20) == (16384 + 1024, 768)


def test_golden_config_vectors_and_blobs():
    with open_container(golden_path("raw")) as container:
        assert container.config == CONFIG and container.meta == {"converter": "golden 1"}
    with open_container(golden_path("carried")) as container:
        vectors = container.load_vectors()
        assert vectors["final_norm.weight"].tolist() == [i / 64 for i in range(1, 65)]
        assert vectors["final_norm.bias"].tolist() == [0, 0, 0]
        assert container.read_blob("chat_template.jinja") == "{{ messages }} ☃\n".encode()
