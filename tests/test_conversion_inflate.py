"""Inflation keeps the function, does not compress, and comes out at the size asked for."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from flashllm import convert
from flashllm.checkpoints import open_checkpoint
from flashllm.container import open_container, verify
from flashllm.conversion.enlarge import inflate
from flashllm.conversion.from_container import ContainerCheckpoint
from flashllm.conversion.inflate import InflatedCheckpoint, Inflation, inflated_config
from flashllm.conversion.inflation_size import choose_inflation, container_bytes
from flashllm.conversion.resolve import resolve
from flashllm.errors import UnsupportedError, UsageError

from .numpy_llama import logits

GOLDEN = Path(__file__).parent / "golden"
LLAMA = sorted(
    p.parent.name
    for p in GOLDEN.glob("*/config.json")
    if p.parent.name.startswith(("llama", "mistral", "qwen2", "qwen3", "arcee"))
    and "-moe" not in p.parent.name
)


@pytest.mark.parametrize("variant", LLAMA)
def test_the_numpy_forward_is_the_golden_function(variant):
    """What the other tests here compare with is itself right."""
    with open_checkpoint(GOLDEN / variant) as checkpoint:
        found = logits(checkpoint, np.load(GOLDEN / variant / "ids.npy"))
    np.testing.assert_allclose(found, np.load(GOLDEN / variant / "logits.npy"), atol=2e-4)


INFLATIONS = [
    Inflation(channels=2, neurons=2, kv_groups=2, extra_layers=3),
    Inflation(channels=3, neurons=3, kv_groups=3, seed=7),
    Inflation(channels=4, neurons=2, kv_groups=1),
    Inflation(channels=1, neurons=4, kv_groups=4, extra_layers=1, jitter=2.0),
    Inflation(channels=5, jitter=0.0),
    Inflation(channels=2, neurons=6, kv_groups=2, extra_layers=1, apart=True),
]


@pytest.mark.parametrize("inflation", INFLATIONS, ids=str)
@pytest.mark.parametrize("variant", ["llama-tied", "llama-biases", "qwen3", "mistral-window"])
def test_the_function_is_unchanged(variant, inflation):
    ids = np.load(GOLDEN / variant / "ids.npy")
    with open_checkpoint(GOLDEN / variant) as source:
        expected = logits(source, ids)
        inflated = InflatedCheckpoint(source, inflation)
        assert inflated.inflated_config == resolve(inflated).config
        np.testing.assert_allclose(logits(inflated, ids), expected, atol=1e-4)


@pytest.mark.parametrize(
    "variant", ["llama-relu-biases", "llama-ungated-relu2", "llama-ungated-silu", "qwen2-window"]
)
@pytest.mark.parametrize("inflation", [INFLATIONS[0], INFLATIONS[-1]], ids=str)
def test_every_kind_of_ffn_can_be_inflated(variant, inflation):
    ids = np.load(GOLDEN / variant / "ids.npy")
    with open_checkpoint(GOLDEN / variant) as source:
        expected = logits(source, ids)
        found = logits(InflatedCheckpoint(source, inflation), ids)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama-relu", "llama-ungated-relu2"])
def test_copies_fire_apart_where_wanted(variant):
    """Copies 2j and 2j + 1 fire together, others no more often than neurons of their own do."""
    x = np.random.default_rng(0).standard_normal((2000, 40)).astype(np.float32)
    overlap = {}
    for apart in (False, True):
        inflation = Inflation(channels=2, neurons=6, kv_groups=1, apart=apart)
        with open_checkpoint(GOLDEN / variant) as source:
            inflated = InflatedCheckpoint(source, inflation)
            name = "gate" if inflated.inflated_config.gated else "up"
            rows = inflated.rows(f"model.layers.0.mlp.{name}_proj.weight", 0, 6 * 38)
            wide = np.take(np.tile(x, 2), inflated._channels, axis=1)
            copies = np.argsort(inflated._layers[0].neurons).reshape(6, 38)
        fires = (wide @ rows.T > 0)[:, copies]  # input, copy, neuron
        assert (fires[:, 0::2] == fires[:, 1::2]).mean() > 0.999
        both = (fires[:, 0] & fires[:, 2]).sum() / (fires[:, 0] | fires[:, 2]).sum()
        overlap[apart] = both
        assert 0.9 < fires[:, 2:].mean() / fires[:, :2].mean() < 1.1
    assert overlap[False] > 0.999 and overlap[True] < 0.62  # 0.56 at a correlation of 0.63


def test_rows_do_not_depend_on_how_they_are_asked_for():
    with open_checkpoint(GOLDEN / "llama-relu") as source:
        inflated = InflatedCheckpoint(source, INFLATIONS[0])
        again = InflatedCheckpoint(source, INFLATIONS[0])
        for name in inflated.names():
            n = inflated.shape(name)[0]
            whole = inflated.rows(name, 0, n)
            pieces = [again.rows(name, i, min(i + 7, n)) for i in range(0, n, 7)]
            np.testing.assert_array_equal(np.concatenate(pieces), whole, err_msg=name)
            columns = inflated.columns(name, 0, 5)
            if columns is not None:
                np.testing.assert_array_equal(columns, whole[:, :5].T)


def test_converted_it_is_the_same_model(tmp_path):
    ids = np.load(GOLDEN / "llama-relu" / "ids.npy")
    inflation = Inflation(channels=4, neurons=4, kv_groups=2, extra_layers=1)
    with open_checkpoint(GOLDEN / "llama-relu") as source:
        expected = logits(source, ids)
        convert(InflatedCheckpoint(source, inflation), tmp_path / "m.flash", codec="raw")
    assert verify(tmp_path / "m.flash").ok
    with ContainerCheckpoint(tmp_path / "m.flash") as container:
        np.testing.assert_allclose(logits(container, ids), expected, atol=1e-4)
        # and a container can be inflated in its turn
        again = InflatedCheckpoint(container, Inflation(channels=2, neurons=2))
        np.testing.assert_allclose(logits(again, ids), expected, atol=1e-4)


def test_copies_do_not_compress_but_plain_ones_do(tmp_path):
    def ratio(jitter, apart=False):
        inflation = Inflation(
            channels=8, neurons=8, kv_groups=2, extra_layers=2, jitter=jitter, apart=apart
        )
        with open_checkpoint(GOLDEN / "llama-relu") as source:
            path = tmp_path / f"{jitter}{apart}.flash"
            convert(InflatedCheckpoint(source, inflation), path, quant="int8", codec="raw")
        with open_container(path) as container:
            ratios = []
            for name, plane in container.planes.items():
                if name.startswith("layers"):
                    start, size = int(plane.offsets[0]), plane.stored_bytes
                    raw = path.read_bytes()[start : start + size]
                    ratios.append(len(raw) / len(zlib.compress(raw, 6)))
        return np.mean(ratios)

    assert ratio(0.5, apart=True) < 1.15
    assert ratio(0.5) < 1.15  # int8 in groups itself: 1.04 at most where values are Gaussian
    assert ratio(0.0) > 2


SIZES = [
    # target, quant, type of the matrices
    (2**21, "int8", "f32"),
    (64 * 2**20, "int8", "f32"),
    (2**30, "keep", "bf16"),
    (4 * 2**30, "int8", "f32"),
    (7 * 2**30, "int4", "f32"),
]


@pytest.mark.parametrize(("target", "quant", "dtype"), SIZES)
@pytest.mark.parametrize("variant", ["llama-relu", "llama-ungated-relu2", "qwen3"])
def test_a_wanted_size_is_met(variant, target, quant, dtype):
    with open_checkpoint(GOLDEN / variant) as source:
        config = resolve(source).config
    inflation = choose_inflation(config, target, quant=quant, dtype=dtype)
    inflation.check()
    new = inflated_config(config, inflation)
    assert target <= container_bytes(new, quant, dtype) < 1.12 * target
    planes = {p.name: p for p in new.roles().planes}
    ffn = sum(t.n_items * t.n_cols for _, t in planes["layers.0.ffn"].tensors)
    if "layers.0.deciding" in planes:
        ffn += sum(t.n_items * t.n_cols for _, t in planes["layers.0.deciding"].tensors)
    attention = sum(t.n_items * t.n_cols for _, t in planes["layers.0.qkv"].tensors)
    attention += sum(t.n_items * t.n_cols for _, t in planes["layers.0.o"].tensors)
    if target > 2**26:
        assert 0.25 < attention / (attention + ffn) < 0.42
        assert new.n_layers >= 12


@pytest.mark.parametrize("quant", ["keep", "int8"])
def test_the_verb_takes_checkpoints_and_containers(tmp_path, quant):
    ids = np.load(GOLDEN / "llama-relu" / "ids.npy")
    convert(GOLDEN / "llama-relu", tmp_path / "small.flash")
    reports = [
        inflate(source, tmp_path / name, size_bytes=3 * 2**20, quant=quant)
        for source, name in ((GOLDEN / "llama-relu", "a"), (tmp_path / "small.flash", "b"))
    ]
    expected = np.load(GOLDEN / "llama-relu" / "logits.npy")
    limit = {"keep": 0.02, "int8": 0.12}[quant] * expected.std()
    for name, report in zip("ab", reports, strict=True):
        assert 3 * 2**20 <= report.output_bytes < 1.3 * 3 * 2**20
        with ContainerCheckpoint(tmp_path / name) as container:
            found = logits(container, ids)
        assert np.sqrt(np.mean((found - expected) ** 2)) < limit
    with pytest.raises(UsageError, match="smallest"):
        inflate(GOLDEN / "llama-relu", tmp_path / "c", size_bytes=1000)
    with pytest.raises(UnsupportedError, match="llama"):
        inflate(GOLDEN / "opt", tmp_path / "c", size_bytes=2**20)


BAD = [
    dict(channels=0),
    dict(neurons=3, kv_groups=2, extra_layers=1),
    dict(neurons=2, kv_groups=1, extra_layers=1),
    dict(dtype="int8"),
    dict(jitter=-1.0),
]


@pytest.mark.parametrize("numbers", BAD, ids=str)
def test_impossible_inflations_are_refused(numbers):
    with pytest.raises(UsageError, match="inflation"):
        Inflation(**numbers).check()


def test_only_llama_is_inflated():
    with open_checkpoint(GOLDEN / "opt") as source, pytest.raises(UnsupportedError, match="llama"):
        InflatedCheckpoint(source, Inflation())
    with open_checkpoint(GOLDEN / "qwen3") as source, pytest.raises(UsageError, match="smallest"):
        choose_inflation(resolve(source).config, 1000, quant="int8")
