"""Dense FFNs whose matrices lie by rows: what a conversion makes of them, and what is computed."""

from __future__ import annotations

import numpy as np
import pytest

from flashllm import LLM, convert
from flashllm.assembly.plan import rank_of
from flashllm.calibration.density import calibrate
from flashllm.cli.main import main
from flashllm.container import open_container
from flashllm.conversion.from_container import PlaneReader
from flashllm.conversion.relayout import relayout
from flashllm.errors import FormatError, UnsupportedError, UsageError
from flashllm.models.base import bundling
from flashllm.models.configs import config_from_dict
from flashllm.models.shapes import check_shapes
from flashllm.quant import WEIGHT_TYPES

from . import tiny
from .forced import nothing_recorded, opened

IDS = np.arange(2, 40)
# Gated and not, with biases and without, down projections stored either way round, tied, parallel.
DENSE = [
    "llama-mha", "llama-biases", "llama-gelu", "llama-ungated-silu", "gemma2", "gpt2", "neox",
    "falcon-multi-query", "phi3", "granite", "deepseek",
]  # fmt: skip


def items(container, name: str) -> np.ndarray:
    return PlaneReader(container.planes[name], container).whole(0, container.planes[name].n_items)


@pytest.mark.parametrize("variant", DENSE)
def test_same_function_as_bundles(variant, tmp_path):
    source, logits = tiny.checkpoint(tmp_path, variant), {}
    for bundle in ("rows", "all", None):
        out = tmp_path / f"{bundle}.flash"
        convert(str(source), str(out), quant="f32", bundle=bundle)
        with LLM(str(out), prefill_chunk=7) as llm:
            assert bundling(llm.container.planes) == (bundle or "rows")
            logits[bundle] = llm.logits(IDS)
    np.testing.assert_array_equal(logits["rows"], logits[None])  # the default
    assert (logits["rows"] != logits["all"]).any()  # the sums have another order
    np.testing.assert_allclose(logits["rows"], logits["all"], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("variant", ["llama-biases", "gpt2"])
@pytest.mark.parametrize("quant", ["int8", "int4", "bf16"])
@pytest.mark.parametrize(
    "how", [{"share": 0.0}, {"share": 0.4}, {"share": 0.4, "whole": "gate"}, {"share": 0.9}],
    ids=str,
)
def test_streamed_is_resident(variant, quant, how, tmp_path, monkeypatch):
    path = tiny.container(tmp_path, variant, tokenizer=False, quant=quant, frame_bytes=512)
    wanted = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 3}
    ids, found = IDS[:9].tolist(), []
    for share in ({"share": 1.0}, how):
        with opened(path, monkeypatch, ram_budget="1GiB", **share) as llm:
            assert bundling(llm.container.planes) == "rows"
            said = llm.generate(ids, **wanted)
            found.append((llm.logits(IDS).tobytes(), said.tokens, said.logprobs))
    with opened(path, monkeypatch, ram_budget="1GiB", prefill_chunk=1, num_threads=1) as llm:
        nothing_recorded(monkeypatch)
        said = llm.generate(ids, **wanted)
        found.append((llm.logits(IDS).tobytes(), said.tokens, said.logprobs))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("variant", ["llama-biases", "gpt2"])
def test_planes_are_the_checkpoints_matrices(variant, tmp_path):
    path = tiny.container(tmp_path, variant, quant="int8")
    bundles = tmp_path / "bundles.flash"
    convert(str(tmp_path / variant), str(bundles), quant="f32", bundle="all")
    with open_container(path) as rows, open_container(bundles) as neurons:
        for layer in range(rows.config["n_layers"]):
            ffn = neurons.planes[f"layers.{layer}.ffn"]
            reader = PlaneReader(ffn, neurons)
            for piece in ffn.pieces:
                values = reader.items(piece, 0, ffn.n_items).view(np.float32)
                if piece.name == "down":
                    values = np.ascontiguousarray(values.T)
                expected = WEIGHT_TYPES["int8"].encode(values)
                found = items(rows, f"layers.{layer}.{piece.name}")[:, : expected.shape[1]]
                np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("variant", ["llama-biases", "gpt2", "deepseek"])
def test_a_container_is_converted_either_way(variant, tmp_path, monkeypatch):
    """Where the type keeps every bit: rows become neurons and neurons rows, as from the source."""
    monkeypatch.setattr("flashllm.conversion.from_container.BLOCK_BYTES", 1000)  # in many blocks
    source, made = tiny.checkpoint(tmp_path, variant), {}
    for bundle in ("rows", "all"):
        made[bundle] = tmp_path / f"{bundle}.flash"
        convert(str(source), str(made[bundle]), bundle=bundle)
    for start, end in (("rows", "all"), ("all", "rows"), ("all", "split"), ("rows", "split")):
        there = tmp_path / "there.flash"
        convert(str(made[start]), str(there), bundle=end, overwrite=True)
        direct = tmp_path / "direct.flash"
        convert(str(source), str(direct), bundle=end, overwrite=True)
        with open_container(there) as a, open_container(direct) as b:
            assert list(a.planes) == list(b.planes) and bundling(a.planes) == end
            for name in a.planes:
                np.testing.assert_array_equal(items(a, name), items(b, name), err_msg=name)


def test_what_is_refused(tmp_path, capsys):
    rows, out = tiny.container(tmp_path, "llama-mha", quant="int8"), tmp_path / "x.flash"
    sparse = tiny.container(tmp_path, "llama-relu", quant="int8")
    with pytest.raises(UsageError, match="scales of their own.*bundle all or split"):
        relayout(rows, out, bundle="split")
    with pytest.raises(UsageError, match="scales of their own"):
        relayout(sparse, out, bundle="rows")
    with pytest.raises(UsageError, match="with relu this model has none"):
        convert(str(tmp_path / "llama-relu"), str(out), bundle="rows")
    with open_container(rows) as container:
        n = container.config["intermediate_size"]
    with pytest.raises(UsageError, match="ask for bundle all"):
        convert(str(tmp_path / "llama-mha"), str(out), order={0: np.arange(n)})
    with LLM(str(rows)) as llm, pytest.raises(UnsupportedError, match="convert with --bundle sp"):
        calibrate(llm, "text", densities=[0.5], n_tokens=8)
    assert main(["fit", str(rows), "--text", str(tmp_path / "llama-mha" / "config.json")]) != 0
    assert not out.exists()
    capsys.readouterr()
    assert main(["inspect", str(rows)]) == 0
    assert "layout: rows" in capsys.readouterr().out


def test_rows_of_a_sparse_model_are_no_model_of_ours(tmp_path):
    with open_container(tiny.container(tmp_path, "llama-mha")) as container:
        config = config_from_dict(container.family, container.config, path=container.path)
        check_shapes(config, container.planes, container.vectors, container.path)
        relu = config_from_dict(
            container.family, {**container.config, "activation": "relu"}, path=container.path
        )
        with pytest.raises(FormatError, match="plane layers.0.deciding"):
            check_shapes(relu, container.planes, container.vectors, container.path)


def test_attention_is_kept_before_rows_of_an_ffn(tmp_path):
    for variant, ffn in (("llama-mha", 2), ("deepseek", 0)):  # beside experts as much in need
        with open_container(tiny.container(tmp_path, variant, quant="int8")) as container:
            ranks = {name: rank_of(name, container, set()) for name in container.planes}
        assert {ranks[f"layers.0.{name}"] for name in ("gate", "up", "down")} == {ffn}
        assert ranks["layers.0.qkv"] == ranks["layers.0.o"] == 0
