"""Recording from a running model: the same sets whatever the chunk, and those that NumPy finds."""

from __future__ import annotations

import numpy as np
import pytest

from flashllm import LLM
from flashllm.calibration.recording import record, sparse_layers
from flashllm.cli.main import main
from flashllm.conversion.relayout import relayout
from flashllm.errors import UnsupportedError, UsageError
from flashllm.tracing import read_trace
from flashllm.tracing.writer import COMPRESSOR_BYTES

from . import tiny

TEXT = "once upon a time there was a fox. <|endoftext|> the fox was old, and it was happy! " * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.container(tmp_path_factory.mktemp("trace"))


def recorded(model, out, **options):
    with LLM(str(model), n_context=32, prefill_chunk=options.pop("chunk", 8)) as llm:
        n = record(llm, TEXT, out, text_name="t", **options)
    trace = read_trace(out)
    assert trace.n_tokens == n
    return trace


def test_chunks_and_single_tokens_record_the_same(model, tmp_path):
    one = recorded(model, tmp_path / "a.fltrace", n_tokens=70, chunk=1)
    many = recorded(model, tmp_path / "b.fltrace", n_tokens=70, chunk=16)
    assert one.n_tokens == 70 and one.starts.tolist() == many.starts.tolist()
    assert len(one.starts) > 2 and np.diff(one.starts).max() <= 32
    for layer in range(len(one.layers)):
        assert (one.bits(layer) == many.bits(layer)).all()
        assert 0 < one.bits(layer).mean() < 1


def test_what_is_recorded_is_what_the_step_counts(model, tmp_path):
    trace = recorded(model, tmp_path / "t.fltrace", n_tokens=20, window=20)
    with LLM(str(model), n_context=32, prefill_chunk=1) as llm:
        ids = llm.encode("", add_bos=True) + llm.encode(
            TEXT.split("<|endoftext|>")[0].strip(), add_bos=False
        )
        seen: list[dict] = []
        llm.observe(ids[:20], lambda layer, x, decided: seen.append(
            {"layer": layer, "n": int((decided > 0).sum()), "shape": (x.shape, decided.shape)}
        ))
        assert llm.model.observer is None
        layers = sparse_layers(llm)[0]
    for i, layer in enumerate(layers):
        counts = [s["n"] for s in seen if s["layer"] == layer]
        assert trace.bits(i).sum(axis=1).tolist() == counts
    assert {s["shape"][0][0] for s in seen} == {1}


def test_what_waits_to_be_written_is_lent_by_the_engine(model, tmp_path):
    lines = []
    with LLM(str(model), n_context=32) as llm:
        record(llm, TEXT, tmp_path / "t.fltrace", n_tokens=40, text_name="t",
               progress=lambda *_: lines.append(llm.plan.ledger.lines()))  # fmt: skip
        assert "lent to the caller" not in llm.plan.ledger.lines()
    assert lines and all(line["lent to the caller"] >= COMPRESSOR_BYTES for line in lines)


def test_the_verb_writes_a_trace_and_its_card(model, tmp_path, capsys):
    text, out = tmp_path / "t.txt", tmp_path / "t.fltrace"
    text.write_text(TEXT)
    assert main(["trace", str(model), "--text", str(text), "--tokens", "40", "-o", str(out)]) == 0
    card = out.with_suffix(".md").read_text()
    trace = read_trace(out)
    assert trace.model in card and trace.text in card and "40 tokens" in card
    assert card.strip() == capsys.readouterr().out.strip()
    assert main(["trace", str(model), "--text", str(text), "-o", str(tmp_path / "x.txt")]) == 2


@pytest.mark.parametrize("variant", ["mixtral", "qwen2-moe"])
def test_chosen_experts_are_recorded(tmp_path, variant, monkeypatch):
    from flashllm.models import moe

    routed = tiny.container(tmp_path, variant)
    chosen, plain = [], moe.route

    def spy(*args, **kwargs):
        found = plain(*args, **kwargs)
        chosen.append(found[0].copy())
        return found

    monkeypatch.setattr(moe, "route", spy)
    trace = recorded(routed, tmp_path / "t.fltrace", n_tokens=40, window=20, chunk=1)
    with LLM(str(routed)) as llm:
        config, planes = llm.config, llm.container.planes
    assert [x.plane for x in trace.layers] == [f"layers.{i}.experts" for i in config.expert_layers]
    for i, layer in enumerate(trace.layers):
        plane = planes[layer.plane]
        assert layer.n_bundles == config.n_experts
        assert layer.bundle_bytes * layer.n_bundles == plane.n_items * plane.stride
        ours = [np.flatnonzero(bits).tolist() for bits in trace.bits(i)]
        assert ours == [c[0].tolist() for c in chosen[i :: len(trace.layers)]]
    with pytest.raises(UsageError, match="orders no neurons"):
        relayout(routed, tmp_path / "n.flash", trace=tmp_path / "t.fltrace")


def test_what_cannot_be_recorded(tmp_path, model):
    dense = tiny.container(tmp_path, "llama-mha")
    with LLM(str(dense)) as llm, pytest.raises(UnsupportedError, match="naturally sparse"):
        record(llm, TEXT, tmp_path / "t.fltrace", n_tokens=4, text_name="t")
    with LLM(str(model)) as llm:
        for text, n in (("", 4), (TEXT, 0)):
            with pytest.raises(UsageError):
                record(llm, text, tmp_path / "t.fltrace", n_tokens=n, text_name="t")
    assert not list(tmp_path.glob("*.fltrace*"))
