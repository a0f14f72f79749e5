"""Conversion: every tensor of every variant arrives, in its place and bit for bit."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from flashllm import convert
from flashllm.checkpoints import open_checkpoint
from flashllm.container import open_container, verify
from flashllm.conversion import layout, source, transpose
from flashllm.conversion.from_container import ContainerCheckpoint
from flashllm.conversion.resolve import resolve
from flashllm.errors import CheckpointError, UnknownNameError, UnsupportedError, UsageError
from flashllm.models.configs import config_from_dict
from flashllm.quant import WEIGHT_TYPES

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = sorted(p.parent.name for p in GOLDEN.glob("*/config.json"))


def tensors(checkpoint):
    """Role name -> float32 values, whatever the checkpoint calls them."""
    resolved = resolve(checkpoint)
    return {
        tensor.names[0]: checkpoint.rows(name, 0, checkpoint.shape(name)[0])
        for tensor, name in resolved.names.items()
    }


@pytest.mark.parametrize("codec", ["auto", "raw", "zstd"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_keep_is_exact(tmp_path, variant, codec):
    report = convert(GOLDEN / variant, tmp_path / "m.flash", codec=codec, frame_bytes=700)
    assert verify(tmp_path / "m.flash").ok
    with (
        open_checkpoint(GOLDEN / variant) as first,
        ContainerCheckpoint(tmp_path / "m.flash") as second,
    ):
        expected, found = tensors(first), tensors(second)
        assert expected.keys() == found.keys()
        for name in expected:
            np.testing.assert_array_equal(expected[name], found[name], err_msg=name)
        types = {first.dtype(name) for name in first.names() if len(first.shape(name)) == 2}
    with open_container(tmp_path / "m.flash") as container:
        planes = [p for name, p in container.planes.items() if not name.endswith(".router")]
        pieces = [piece for plane in planes for piece in plane.pieces]
        assert {piece.weight_type for piece in pieces} == types
        assert all(plane.n_frames > 1 for plane in planes)
        config = config_from_dict(container.family, container.config)
        assert config == resolve(open_checkpoint(GOLDEN / variant)).config
    assert report.output_bytes == (tmp_path / "m.flash").stat().st_size
    assert report.quant == "keep" and report.seconds > 0


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["llama-relu-biases", "qwen3", "opt-350m-like"])
def test_quantised_planes_stay_within_their_bound(tmp_path, variant, quant):
    convert(GOLDEN / variant, tmp_path / "m.flash", quant=quant)
    with (
        open_checkpoint(GOLDEN / variant) as first,
        ContainerCheckpoint(tmp_path / "m.flash") as second,
    ):
        expected, found = tensors(first), tensors(second)
    with open_container(tmp_path / "m.flash") as container:
        for name, plane in container.planes.items():
            if name in ("embed", "head"):
                assert plane.pieces[0].weight_type == "int8"
            elif name != "position":
                assert {piece.weight_type for piece in plane.pieces} == {quant}
    for name, values in expected.items():
        if values.ndim == 1 or "position" in name:
            np.testing.assert_array_equal(values, found[name], err_msg=name)
            continue
        kind = WEIGHT_TYPES["int8" if "embed_tokens" in name or "lm_head" in name else quant]
        rows, got = values, found[name]
        if "layers.0.ffn" in container.planes and ("down" in name or "fc2" in name):
            rows, got = values.T, found[name].T  # a neuron's column is what was quantised
        rows = np.ascontiguousarray(rows)
        assert (np.abs(got - rows) <= kind.error_bound(rows)).all(), name
        assert not np.array_equal(got, rows)


def test_columns_through_a_scratch_file_are_the_columns(tmp_path, monkeypatch):
    plain = convert(GOLDEN / "llama-relu", tmp_path / "a.flash", codec="raw")
    monkeypatch.setattr(source, "COLUMNS_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(source, "BLOCK_BYTES", 1200)
    monkeypatch.setattr(transpose, "STRIPE_BYTES", 500)
    through = convert(GOLDEN / "llama-relu", tmp_path / "b.flash", codec="raw")
    assert plain.digest == through.digest
    assert sorted(os.listdir(tmp_path)) == ["a.flash", "b.flash"]


@pytest.mark.parametrize("variant", ["llama-relu-biases", "llama-ungated-silu", "opt"])
def test_order_moves_whole_neurons(tmp_path, variant):
    with open_checkpoint(GOLDEN / variant) as checkpoint:
        config = resolve(checkpoint).config
    order = np.random.default_rng(0).permutation(config.intermediate_size)
    bundle = None if config.sparse else "all"
    convert(GOLDEN / variant, tmp_path / "a.flash", bundle=bundle)
    convert(GOLDEN / variant, tmp_path / "b.flash", order={1: order}, bundle=bundle)
    with (
        ContainerCheckpoint(tmp_path / "a.flash") as a,
        ContainerCheckpoint(tmp_path / "b.flash") as b,
    ):
        plain, moved = tensors(a), tensors(b)
    n_moved = 0
    for name, values in plain.items():
        per_neuron = ".1." in name and any(
            part in name for part in ("gate_proj", "up_proj", "fc1", "down_proj.w", "fc2.w")
        )
        if per_neuron:
            n_moved += 1
            transposed = "down_proj" in name or "fc2" in name
            values = values[:, order] if transposed else values[order]
        np.testing.assert_array_equal(values, moved[name], err_msg=name)
    assert n_moved >= 2


BAD_ORDERS = [{2: np.arange(38)}, {0: np.arange(37)}, {0: np.zeros(38, int)}, {-1: np.arange(38)}]


@pytest.mark.parametrize("order", BAD_ORDERS)
def test_orders_must_be_permutations(tmp_path, order):
    with pytest.raises(UsageError, match="order"):
        convert(GOLDEN / "llama-relu", tmp_path / "m.flash", order=order)


def test_requantising_a_container(tmp_path):
    convert(GOLDEN / "llama-relu", tmp_path / "a.flash")
    with ContainerCheckpoint(tmp_path / "a.flash") as middle:
        through = convert(middle, tmp_path / "b.flash", quant="int8")
    direct = convert(GOLDEN / "llama-relu", tmp_path / "c.flash", quant="int8")
    assert through.output_bytes == pytest.approx(direct.output_bytes, abs=4096)
    with open_container(tmp_path / "b.flash") as b, open_container(tmp_path / "c.flash") as c:
        for name, plane in b.planes.items():
            assert plane.pieces == c.planes[name].pieces
    with (
        ContainerCheckpoint(tmp_path / "b.flash") as b,
        ContainerCheckpoint(tmp_path / "c.flash") as c,
    ):
        for name in b.names():
            n = b.shape(name)[0]
            np.testing.assert_array_equal(b.rows(name, 0, n), c.rows(name, 0, n))


def copy_of(variant: str, folder: Path) -> Path:
    for file in (GOLDEN / variant).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change_config(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_silent_config_is_corrected_and_said(tmp_path):
    folder = change_config(copy_of("llama-ungated-relu2", tmp_path), mlp_gated=None)
    report = convert(folder, tmp_path / "m.flash")
    assert any("no gate_proj" in warning for warning in report.warnings)
    explicit = convert(GOLDEN / "llama-ungated-relu2", tmp_path / "n.flash")
    assert not explicit.warnings
    with open_container(tmp_path / "m.flash") as m, open_container(tmp_path / "n.flash") as n:
        assert m.config == n.config and m.meta["warnings"] == report.warnings


def test_tying_follows_the_tensors(tmp_path):
    folder = change_config(copy_of("llama-tied", tmp_path), tie_word_embeddings=False)
    report = convert(folder, tmp_path / "m.flash")
    assert any("lm_head.weight is absent" in warning for warning in report.warnings)
    folder = change_config(copy_of("llama-mha", tmp_path), tie_word_embeddings=True)
    report = convert(folder, tmp_path / "n.flash")
    assert any("differ" in warning for warning in report.warnings)
    with open_container(tmp_path / "m.flash") as m, open_container(tmp_path / "n.flash") as n:
        assert "head" not in m.planes and "head" in n.planes


def test_ends_of_sequence_are_collected(tmp_path):
    folder = copy_of("llama-mha", tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7, 4000]}))
    report = convert(folder, tmp_path / "m.flash")
    with open_container(tmp_path / "m.flash") as container:
        assert container.config["eos_ids"] == [2, 7]
    assert any("4000" in warning for warning in report.warnings)


def test_unused_tensors_are_named(tmp_path):
    folder = change_config(copy_of("llama-mha", tmp_path), num_hidden_layers=1)
    report = convert(folder, tmp_path / "m.flash")
    assert any("9 tensors" in w and "layers.1.input_layernorm" in w for w in report.warnings)


BROKEN = [
    ({"intermediate_size": 39}, CheckpointError, "mlp"),
    ({"num_hidden_layers": 3}, CheckpointError, r"layers\.2"),
    ({"num_hidden_layers": 4000}, CheckpointError, "4000"),
    ({"vocab_size": 65}, CheckpointError, "embed_tokens"),
    ({"attention_bias": True}, CheckpointError, r"q_proj\.bias"),
    ({"hidden_act": "mish"}, UnsupportedError, "mish"),
]


@pytest.mark.parametrize(("changes", "error", "named"), BROKEN)
def test_contradictions_leave_nothing_behind(tmp_path, changes, error, named):
    (tmp_path / "source").mkdir()
    folder = change_config(copy_of("llama-mha", tmp_path / "source"), **changes)
    with pytest.raises(error, match=named):
        convert(folder, tmp_path / "m.flash")
    assert os.listdir(tmp_path) == ["source"]


def test_values_that_cannot_be_held_name_the_tensor(tmp_path):
    folder = copy_of("llama-mha", tmp_path)
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-2:] = b"\x80\x7f"  # the last tensor's last bf16 value becomes infinite
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"tensor '.*weight'"):
        convert(folder, tmp_path / "m.flash")
    assert not (tmp_path / "m.flash").exists()


def test_arguments_are_checked(tmp_path):
    target = tmp_path / "m.flash"
    with pytest.raises(UsageError, match="int7"):
        convert(GOLDEN / "opt", target, quant="int7")
    with pytest.raises(UnknownNameError, match="lz5"):
        convert(GOLDEN / "opt", target, codec="lz5")
    convert(GOLDEN / "opt", target)
    with pytest.raises(UsageError, match="exists"):
        convert(GOLDEN / "opt", target)
    convert(GOLDEN / "opt", target, overwrite=True)
    folder = copy_of("opt", tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="source"):
        convert(folder, folder / "model.safetensors", overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before


def test_progress_rises_to_the_total(tmp_path):
    seen = []
    convert(GOLDEN / "qwen3", tmp_path / "m.flash", progress=lambda *step: seen.append(step))
    done = [step[0] for step in seen]
    assert done == sorted(done) and done[-1] == seen[-1][1] > 0
    assert {step[1] for step in seen} == {seen[0][1]}
    assert "layers.1.down" in {step[2] for step in seen}


def test_same_input_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        convert(GOLDEN / "qwen2", tmp_path / name, quant="int4")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tokenizer_files_are_blobs(tmp_path):
    folder = copy_of("llama-mha", tmp_path)
    (folder / "tokenizer.json").write_bytes(b"{}\x00")
    convert(folder, tmp_path / "m.flash")
    with open_container(tmp_path / "m.flash") as container:
        assert container.read_blob("tokenizer.json") == b"{}\x00"


FRAMES = [
    # stride, items, target, at least, alignment -> items in a frame
    (8192, 14336, 2**18, False, 4096, 32),
    (8192, 14336, 2**14, True, 4096, 2),
    (3200, 5000, 2**14, True, 4096, 6),
    (2**20 + 16, 100, 2**18, False, 4096, 1),
    (40000, 100, 2**14, True, 4096, 1),
    (272, 3, 2**18, False, 512, 3),
]


@pytest.mark.parametrize(("stride", "n", "target", "at_least", "alignment", "expected"), FRAMES)
def test_items_per_frame(stride, n, target, at_least, alignment, expected):
    found = layout.items_per_frame(
        stride, n, target_bytes=target, at_least=at_least, alignment=alignment
    )
    assert found == expected
    assert found == 1 or found * stride <= 2**20
    if at_least:
        assert found == n or found * stride >= target


CODECS = [
    # use, types, ratios, flash, chosen
    ("dense", {"bf16"}, {"planes": 1.5}, None, "planes"),
    ("sparse", {"bf16"}, {"planes": 1.5}, None, "raw"),
    ("dense", {"bf16"}, {"planes": 1.05}, None, "raw"),
    ("dense", {"int8"}, {"zstd": 1.3}, None, "raw"),
    ("dense", {"int8"}, {"zstd": 1.3}, 1e9, "zstd"),
    ("deciding", {"int8"}, {"zstd": 1.05}, 1e8, "raw"),
    ("dense", {"bf16"}, {"planes": 1.5}, 7e9, "raw"),
    ("dense", {"f16"}, {"planes": 1.5}, 1e9, "planes"),
    ("sparse", {"f16"}, {"planes": 1.5}, 3e8, "raw"),
    ("embed", {"f16"}, {"planes": 1.5}, 3e8, "raw"),
]


@pytest.mark.parametrize(("use", "types", "ratios", "flash", "chosen"), CODECS)
def test_codec_choice(use, types, ratios, flash, chosen):
    found, reason = layout.choose_codec(use, types, ratios, flash_bytes_per_s=flash)
    assert found == chosen and reason


def test_widest_type_of_stacked_parts():
    assert layout.widest(["bf16", "bf16"]) == "bf16"
    assert layout.widest(["bf16", "f16"]) == "f32"
    assert layout.widest(["f64"]) == "f32"
