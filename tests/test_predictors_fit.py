"""The .fit file: what is written is read, and nothing hostile is (FIT.md)."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest

from flashllm.errors import (
    FitMismatchError,
    FlashError,
    FlashReadError,
    FormatError,
    UnsupportedError,
    UsageError,
)
from flashllm.kernels import choose_kernels
from flashllm.predictors import FITTED, fit_path, open_fit
from flashllm.predictors.header import MAGIC, PREAMBLE

from . import fits
from .cheap import refused


@pytest.fixture(scope="module")
def kernels():
    return choose_kernels("serial", n_threads=1)


@pytest.fixture
def path(tmp_path):
    return fits.write(tmp_path / "m.flash.fit")


def rewritten(path, change, *, version=1):
    """The file with a manifest changed by `change` and a preamble that agrees with it."""
    raw = path.read_bytes()
    n = PREAMBLE.unpack_from(raw)[4]
    said = json.loads(raw[64 : 64 + n])
    end = min(x["offset"] for x in said["layers"])
    sections = raw[end:]
    change(said)
    manifest = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    head = 64 + -(-len(manifest) // 64) * 64
    for x in said["layers"]:
        if isinstance(x, dict) and isinstance(x["offset"], int):
            x["offset"] += head - end
    manifest = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    body = manifest.ljust(-(-len(manifest) // 64) * 64, b"\0") + sections
    preamble = PREAMBLE.pack(MAGIC, version, 0, 64 + len(body), len(manifest), 0,
                             hashlib.sha256(manifest).digest())  # fmt: skip
    path.write_bytes(preamble + body)
    return path


def test_what_is_written_is_read(path, kernels):
    fit = open_fit(path)
    assert fit.container_digest == fits.MODEL and fit.recalls == fits.RECALLS
    assert [x.layer for x in fit.layers] == [1, 2] and fit.header.text == fits.TEXT
    loaded = fit.load(kernels, 0.9)
    assert {n: p.name for n, p in loaded.items()} == {1: "low_rank", 2: "low_bit"}
    kept = sum(p.resident_bytes for p in loaded.values())
    assert kept < fit.resident_bytes < kept + 20_000
    assert fit_path("a/m.flash").name == "m.flash.fit"
    assert not list(path.parent.glob("*.partial")) and not list(path.parent.glob("*.sections"))


def test_the_least_fitted_recall_that_is_enough(path, kernels):
    fit = open_fit(path)
    x = np.random.default_rng(3).standard_normal(fits.HIDDEN).astype(np.float32)
    few, many = (set(fit.load(kernels, r)[2].predict(x).tolist()) for r in (0.9, 0.95))
    assert few < many
    assert set(fit.load(kernels, 0.99)[2].predict(x).tolist()) == many
    with pytest.raises(UsageError, match=r"fitted for up to 0\.99"):
        fit.load(kernels, 0.995)


def test_another_container_is_named(path):
    fit = open_fit(path)
    fit.require(fits.MODEL)
    with pytest.raises(FitMismatchError) as caught:
        fit.require("12" * 32)
    assert fits.MODEL in str(caught.value) and "12" * 32 in str(caught.value)


def test_a_fit_that_claims_a_digest_and_has_another_shape(path):
    fit = open_fit(path)
    fit.require_shape(fits.HIDDEN, {0: 5, 1: fits.N, 2: fits.N})
    for hidden, bundles in ((8, {1: fits.N, 2: fits.N}), (fits.HIDDEN, {1: fits.N}),
                            (fits.HIDDEN, {1: fits.N, 2: fits.N - 1})):  # fmt: skip
        with pytest.raises(FormatError, match="hidden_size|n_bundles"):
            fit.require_shape(hidden, bundles)


def test_predictors_inside_another_file(path, tmp_path, kernels):
    raw = path.read_bytes()
    cuts = [0, 30, 64, 700, len(raw) - 9, len(raw)]
    parts = [raw[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    host, extents = b"?" * 100, []
    for part in reversed(parts):
        extents.insert(0, (len(host), len(part)))
        host += part + b"!" * 7
    inside = tmp_path / "host"
    inside.write_bytes(host)
    fit = open_fit(inside, extents=extents)
    x = np.random.default_rng(3).standard_normal(fits.HIDDEN).astype(np.float32)
    for n, predictor in fit.load(kernels, 0.9).items():
        same = open_fit(path).load(kernels, 0.9)[n]
        assert (predictor.predict(x).copy() == same.predict(x)).all()


# ------------------------------------------------------------------------------------- hostile


def loads(path, kernels):
    open_fit(path).load(kernels, 0.9)


def test_every_flipped_byte_is_noticed(path, kernels):
    raw = path.read_bytes()
    head = open_fit(path).layers[0].offset
    for at in [*range(head), *range(head, len(raw), 5), len(raw) - 1]:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises((FormatError, UnsupportedError)):
            loads(path, kernels)


def test_every_truncation_is_noticed(path, kernels):
    raw = path.read_bytes()
    for n in [*range(0, 200), *range(200, len(raw), 37), len(raw) - 1]:
        path.write_bytes(raw[:n])
        with pytest.raises(FormatError):
            loads(path, kernels)
    path.write_bytes(raw + b"\0")
    with pytest.raises(FormatError, match="file bytes"):
        loads(path, kernels)


def layer_change(**changes):
    return lambda said: said["layers"][0].update(changes)


HOSTILE = {
    "no layers": lambda s: s.update(layers=[]),
    "layers twice": lambda s: s["layers"].append(dict(s["layers"][0])),
    "huge hidden": lambda s: s.update(hidden_size=2**40),
    "hidden true": lambda s: s.update(hidden_size=True),
    "another hidden": lambda s: s.update(hidden_size=fits.HIDDEN * 8),
    "huge bundles": layer_change(n_bundles=2**60),
    "many bundles": layer_change(n_bundles=2**24),
    "huge rank": layer_change(form={"rank": 2**40, "weight_type": "int8"}),
    "large rank": layer_change(form={"rank": 16384, "weight_type": "int8"}),
    "no rank": layer_change(form={}),
    "float type": layer_change(form={"rank": 5, "weight_type": "f32"}),
    "list type": layer_change(form={"rank": 5, "weight_type": ["int8"]}),
    "unknown kind": layer_change(kind="magic"),
    "kind of a list": layer_change(kind=["low_rank"]),
    "unit 0": layer_change(unit=0),
    "offset elsewhere": layer_change(offset=64),
    "offset negative": layer_change(offset=-64),
    "long section": layer_change(bytes=2**50),
    "digest": layer_change(sha256="0" * 64),
    "short digest": layer_change(sha256="0"),
    "thresholds": layer_change(thresholds=[1.0]),
    "threshold text": layer_change(thresholds=["1", 2.0]),
    "threshold huge": layer_change(thresholds=[1e300, 2.0]),
    "layer negative": layer_change(layer=-1),
    "layer a list": lambda s: s["layers"].__setitem__(0, []),
    "one key more": lambda s: s.update(extra=1),
    "one key less": lambda s: s.pop("model"),
    "model a number": lambda s: s.update(model=1),
    "name too long": lambda s: s.update(text_name="x" * 1000),
    "recalls falling": lambda s: s.update(recalls=[0.99, 0.9]),
    "recall of one": lambda s: s.update(recalls=[0.9, 1.0]),
    "no recalls": lambda s: s.update(recalls=[]),
    "rows beyond": lambda s: s["layers"][1].update(form={"rows": [2**30, 0, 0, 0, 0, 0]}),
    "rows negative": lambda s: s["layers"][1].update(form={"rows": [-1, 30, 0, 0, 0, 0]}),
    "rows few": lambda s: s["layers"][1].update(form={"rows": [29]}),
    "no rows": lambda s: s["layers"][1].update(form={"rows": [0] * 6}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifests(path, kernels, case):
    changed = rewritten(path, HOSTILE[case])
    refused(FormatError, lambda: loads(changed, kernels))


def test_another_version_is_unsupported(path, kernels):
    with pytest.raises(UnsupportedError, match="version 2"):
        loads(rewritten(path, lambda s: None, version=2), kernels)


def test_a_deep_or_spaced_manifest(path, kernels):
    for manifest in (b"[" * 400_000, b"{}", b'{"layers": []}', b"\xff\xfe", b"1e999", b"NaN"):
        body = manifest.ljust(-(-len(manifest) // 64) * 64, b"\0")
        head = PREAMBLE.pack(MAGIC, 1, 0, 64 + len(body), len(manifest), 0,
                             hashlib.sha256(manifest).digest())  # fmt: skip
        path.write_bytes(head + body)
        with pytest.raises(FormatError):
            loads(path, kernels)


def resealed(path, number, change):
    """A section's bytes changed, its digest put right."""
    raw = bytearray(path.read_bytes())
    said = open_fit(path).layers[number]
    section = bytearray(raw[said.offset : said.offset + said.n_bytes])
    change(section)
    raw[said.offset : said.offset + said.n_bytes] = section
    path.write_bytes(raw)
    digest = hashlib.sha256(section).hexdigest()
    return rewritten(path, lambda s: s["layers"][number].update(sha256=digest))


def put(section, at, kind, value):
    struct.pack_into(kind, section, at, value)


def rest_at(path, number):
    layer = open_fit(path).layers[number]
    return FITTED[layer.kind].weight_bytes(layer)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 0.0])
def test_scales_are_positive_and_finite(path, kernels, value):
    at = rest_at(path, 1)
    with pytest.raises(FormatError, match="layer 2"):
        loads(resealed(path, 1, lambda s: put(s, at, "<f", value)), kernels)


def test_biases_are_finite_and_ids_in_order(path, kernels, tmp_path):
    raw = path.read_bytes()
    at, n = rest_at(path, 1), sum(open_fit(path).layers[1].form["rows"])
    changes = [
        (0, lambda s: put(s, rest_at(path, 0), "<f", np.inf)),
        (1, lambda s: put(s, at + 4 * n, "<f", np.nan)),
        (1, lambda s: put(s, at + 8 * n, "<H", fits.N)),
        (1, lambda s: put(s, at + 8 * n, "<H", 65535)),
        (1, lambda s: s.__setitem__(slice(at + 8 * n, at + 8 * n + 2),
                                    s[at + 8 * n + 2 : at + 8 * n + 4])),
        (1, lambda s: s.__setitem__(slice(at + 10 * n - 2, at + 10 * n), bytes(2))),
    ]  # fmt: skip
    for number, change in changes:
        path.write_bytes(raw)
        with pytest.raises(FormatError, match="layer"):
            loads(resealed(path, number, change), kernels)


def test_things_that_are_no_files(tmp_path, path):
    with pytest.raises(FlashReadError):
        open_fit(tmp_path / "none.fit")
    with pytest.raises(FlashError):
        open_fit(tmp_path)
    fit = open_fit(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(FlashReadError, match="ends .*early"):
        fit.load(choose_kernels(), 0.9)


def test_an_error_while_writing_leaves_nothing(tmp_path):
    from flashllm.calibration.fit_writer import FitWriter

    made = fits.low_rank()
    with pytest.raises(UsageError), FitWriter(tmp_path / "m.fit") as writer:
        writer.add(made[0], made[1][:-80])
    assert not list(tmp_path.iterdir())
