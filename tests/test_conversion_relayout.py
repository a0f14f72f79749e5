"""relayout: every stored value is there, in the order that the trace says; the function stays."""

from __future__ import annotations

import numpy as np
import pytest

from flashllm import LLM
from flashllm.calibration.recording import record
from flashllm.cli.convert import orders_for
from flashllm.cli.main import main
from flashllm.container import open_container
from flashllm.conversion import relayout as module
from flashllm.conversion.from_container import PlaneReader
from flashllm.conversion.relayout import orders_from, relayout
from flashllm.errors import UsageError
from flashllm.tracing import read_trace

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
        assert list(old.planes) == list(laid.planes) and old.blobs.keys() == laid.blobs.keys()
        for name, plane in old.planes.items():
            ids = np.arange(plane.n_items)
            if name.endswith((".ffn", ".deciding")):
                ids = orders[int(name.split(".")[1])]
            before = PlaneReader(plane, old).whole(0, plane.n_items)
            after = PlaneReader(laid.planes[name], laid).whole(0, plane.n_items)
            assert (before[ids] == after).all(), name
            assert laid.planes[name].per_frame == (3 if name.endswith(".ffn") else plane.per_frame)


def test_the_function_stays(made):
    model, _, new = made
    ids = np.arange(2, 40)
    with LLM(str(model)) as a, LLM(str(new)) as b:
        x, y = a.logits(ids), b.logits(ids)
    assert np.abs(x - y).max() < 1e-4 * max(1.0, np.abs(x).max())


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


def test_what_is_refused(made, tmp_path, capsys):
    model, trace, new = made
    out = tmp_path / "x.flash"
    with pytest.raises(UsageError, match="was recorded of"):
        relayout(new, out, trace=trace)
    with pytest.raises(UsageError, match="source"):
        relayout(model, model, trace=trace, overwrite=True)
    with pytest.raises(UsageError, match="frames of"):
        relayout(model, out, trace=trace, per_frame=-1)
    assert main(["relayout", str(model), "--trace", str(trace), "-o", str(out)]) == 0
    assert main(["relayout", str(model), "--trace", str(trace), "-o", str(out)]) == 2
