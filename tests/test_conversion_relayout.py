"""relayout: every stored value is there, in the order that the trace says; the function stays."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flashllm import LLM, convert
from flashllm.calibration.recording import record
from flashllm.cli.convert import orders_for
from flashllm.cli.main import main
from flashllm.container import open_container
from flashllm.conversion import relayout as module
from flashllm.conversion.from_container import PlaneReader
from flashllm.conversion.layout import fewest_bundles
from flashllm.conversion.relayout import orders_from, relayout
from flashllm.errors import FormatError, UsageError
from flashllm.models.base import bundling
from flashllm.tracing import read_trace
from flashllm.tracing.activity import BLOB, decode_activity, layer_use

from . import tiny

TEXT = "once upon a time there was a fox, and it was old! " * 4


@pytest.fixture(scope="module", params=["llama-relu", "llama-relu-biases", "opt"])
def made(request, tmp_path_factory):
    """(container, trace of it, a container laid out by it with 3 bundles per frame)."""
    folder = tmp_path_factory.mktemp("relayout")
    model = tiny.container(folder, request.param)
    trace, new = folder / "t.fltrace", folder / "new.flash"
    with LLM(str(model)) as llm:
        record(llm, TEXT, trace, n_tokens=60, text_name="t")
    relayout(model, new, trace=trace, per_frame=3)
    return model, trace, new


def test_values_are_carried_bit_by_bit(made):
    model, trace, new = made
    recorded = read_trace(trace)
    orders = orders_from(recorded, {info.plane: 3 for info in recorded.layers})
    assert any((ids != np.arange(len(ids))).any() for ids in orders.values())
    with open_container(model) as old, open_container(new) as laid:
        assert list(old.planes) == list(laid.planes)
        assert {*old.blobs, BLOB} == laid.blobs.keys()
        for name, plane in old.planes.items():
            ids = np.arange(plane.n_items)
            if name.endswith((".ffn", ".deciding")):
                ids = orders[int(name.split(".")[1])]
            before = PlaneReader(plane, old).whole(0, plane.n_items)
            after = PlaneReader(laid.planes[name], laid).whole(0, plane.n_items)
            assert (before[ids] == after).all(), name
            assert laid.planes[name].per_frame == (3 if name.endswith(".ffn") else plane.per_frame)


def test_what_tokens_use_is_carried_and_shares_slots_out(made, tmp_path):
    model, trace, new = made
    use = layer_use(read_trace(trace))
    with open_container(new) as laid:
        told = decode_activity(new, laid.read_blob(BLOB))
    assert list(told.values()) == pytest.approx(use, abs=1e-6)
    assert main(["convert", str(model), str(tmp_path / "c.flash"), "--order", str(trace)]) == 0
    relayout(new, tmp_path / "again.flash", per_frame=1)  # carried on
    for path in (tmp_path / "c.flash", tmp_path / "again.flash"):
        with open_container(path) as container:
            assert decode_activity(path, container.read_blob(BLOB)) == told


@pytest.mark.parametrize("raw", [b"", b"[1]", b"nonsense", b'{"layers.0.ffn": 2}',
                                 b'{"layers.0.ffn": "much"}', b'{"layers.0.ffn": NaN}',
                                 b'{"layers.0.ffn": true}', b"\xff"])  # fmt: skip
def test_activity_that_is_none_is_refused(raw):
    with pytest.raises(FormatError) as caught:
        decode_activity("m.flash", raw)
    assert BLOB in str(caught.value) and "m.flash" in str(caught.value)


def test_the_function_stays(made):
    model, _, new = made
    ids = np.arange(2, 40)
    with LLM(str(model)) as a, LLM(str(new)) as b:
        x, y = a.logits(ids), b.logits(ids)
    assert np.abs(x - y).max() < 1e-4 * max(1.0, np.abs(x).max())


@pytest.mark.parametrize("stride, n_items, expected", [
    (4112, 1000, 2),  # 4112 -> 4608 wastes 12 %, 8224 -> 8704 5.8 %
    (4096, 1000, 1), (2032, 1000, 1), (496, 9, 1), (480, 100, 16), (208, 100, 7), (208, 5, 5),
    (100, 1, 1), (2_000_000, 7, 1),
])  # fmt: skip
def test_frames_hold_as_few_bundles_as_padding_allows(stride, n_items, expected):
    assert fewest_bundles(stride, n_items) == expected


def test_what_is_picked_lies_in_small_frames_by_default(made, tmp_path):
    model, trace, _ = made
    for arguments in ({"trace": trace}, {"bundle": "all"}):
        report = relayout(model, tmp_path / "x.flash", overwrite=True, **arguments)
        with open_container(tmp_path / "x.flash") as laid:
            for name, n in report.per_frame.items():
                plane = laid.planes[name]
                assert plane.per_frame == n == fewest_bundles(plane.stride, plane.n_items)


def test_large_planes_are_turned_block_by_block(made, tmp_path, monkeypatch):
    model, trace, new = made
    monkeypatch.setattr(module, "WHOLE_BYTES", 0)
    monkeypatch.setattr(module, "BLOCK_BYTES", 700)
    again = tmp_path / "again.flash"
    relayout(model, again, trace=trace, per_frame=3)
    assert again.read_bytes() == new.read_bytes()


def test_convert_takes_an_order_too(made, tmp_path):
    model, trace, _ = made
    out = tmp_path / "x.flash"
    assert main(["convert", str(model), str(out), "--order", str(trace)]) == 0
    orders = orders_for(read_trace(trace))
    with open_container(model) as old, open_container(out) as new:
        for layer, ids in orders.items():
            name = f"layers.{layer}.ffn"
            before = PlaneReader(old.planes[name], old).whole(0, len(ids))
            after = PlaneReader(new.planes[name], new).whole(0, len(ids))
            assert (before[ids] == after).all() and (before != after).any()


@pytest.mark.parametrize("variant", ["llama-relu-biases", "llama-ungated-relu2", "opt", "qwen3"])
def test_deciding_rows_move_into_the_bundles_and_back(variant, tmp_path):
    """The same bits come out, of the planes and of the model, whatever the arrangement."""
    was = "all" if variant == "qwen3" else None
    model = tiny.container(tmp_path, variant, quant="int8", bundle=was)
    with open_container(model) as source:
        was = bundling(source.planes)
    other = {"all": "split", "split": "all"}[was]
    there, back = tmp_path / "there.flash", tmp_path / "back.flash"
    assert relayout(model, there, bundle=other, per_frame=2).bundle == other
    relayout(there, back, bundle=was)
    again = tmp_path / "again.flash"  # convert knows how to read either
    convert(there, again, quant="int8", bundle=was)
    ids = np.arange(2, 40)
    with LLM(str(model), prefill_chunk=7) as llm:
        expected = llm.logits(ids)
    for path, arranged in ((there, other), (back, was), (again, was)):
        with LLM(str(path), prefill_chunk=7) as llm:
            assert bundling(llm.container.planes) == arranged
            np.testing.assert_array_equal(llm.logits(ids), expected)
    with open_container(model) as a, open_container(back) as b, open_container(there) as c:
        for name, plane in a.planes.items():
            items = [PlaneReader(f.planes[name], f).whole(0, plane.n_items) for f in (a, b)]
            assert (items[0] == items[1]).all(), name
        assert c.planes["layers.0.ffn"].per_frame == 2
        assert c.planes["layers.0.ffn"].n_items == a.planes["layers.0.ffn"].n_items


def test_convert_arranges_too_and_streams_the_same_bits(tmp_path):
    source = tiny.checkpoint(tmp_path, "llama-relu")
    logits = []
    for bundle in ("split", "all"):
        out = tmp_path / f"{bundle}.flash"
        assert main(["convert", str(source), str(out), "--bundle", bundle, "--quant", "int8"]) == 0
        with LLM(str(out), pin=False) as llm:  # nothing kept: everything streams
            assert bundling(llm.container.planes) == bundle
            logits.append(llm.logits(np.arange(2, 40)))
    np.testing.assert_array_equal(*logits)


def test_inspect_says_the_arrangement(made, tmp_path, capsys):
    model, _, _ = made
    out = tmp_path / "all.flash"
    assert main(["relayout", str(model), "-o", str(out), "--bundle", "all"]) == 0
    assert main(["inspect", str(model)]) == 0
    assert "layout: split" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    assert "layout: all" in capsys.readouterr().out
    assert main(["inspect", "--json", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["bundle"] == "all"


def test_a_trace_of_bundles_with_all_pieces_is_the_same_trace(made, tmp_path):
    model, trace, _ = made
    out, found = tmp_path / "all.flash", tmp_path / "all.fltrace"
    relayout(model, out, bundle="all")
    with LLM(str(out), prefill_chunk=5) as llm:
        record(llm, TEXT, found, n_tokens=60, text_name="t")
    a, b = read_trace(trace), read_trace(found)
    assert len(a.layers) == len(b.layers)
    for layer in range(len(a.layers)):
        assert (a.bits(layer) == b.bits(layer)).all()


def test_what_is_refused(made, tmp_path, capsys):
    model, trace, new = made
    out = tmp_path / "x.flash"
    with pytest.raises(UsageError, match="was recorded of"):
        relayout(new, out, trace=trace)
    with pytest.raises(UsageError, match="source"):
        relayout(model, model, trace=trace, overwrite=True)
    with pytest.raises(UsageError, match="nothing to lay out"):
        relayout(model, out)
    with pytest.raises(UsageError, match="bundling"):
        relayout(model, out, bundle="some")
    with pytest.raises(UsageError, match="frames of"):
        relayout(model, out, trace=trace, per_frame=-1)
    assert main(["relayout", str(model), "--trace", str(trace), "-o", str(out)]) == 0
    assert main(["relayout", str(model), "--trace", str(trace), "-o", str(out)]) == 2
