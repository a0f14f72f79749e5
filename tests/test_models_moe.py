"""Experts: routing against the obvious, only the chosen ones read, the same bits however."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashllm import LLM, convert
from flashllm.assembly import open_parts
from flashllm.container import open_container
from flashllm.conversion.enlarge import inflate
from flashllm.conversion.layout import items_per_expert_frame
from flashllm.errors import CheckpointError, FormatError, UnsupportedError, UsageError
from flashllm.models import look_ahead
from flashllm.models.configs import config_from_dict, config_from_hf
from flashllm.models.routing import route, sigmoid
from flashllm.offload import WeightStore
from flashllm.offload.demand import Demand
from flashllm.units import KIB

from .test_exactness import run
from .tiny import GOLDEN

CONFIG = {
    "model_type": "qwen2_moe",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 56,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}
PER_TOKEN = 2 * 3 * 48  # layers, experts, neurons of one


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng, tensors = np.random.default_rng(3), {}
    roles = config_from_hf(CONFIG).roles()
    for plane in roles.planes:
        for _, tensor in plane.tensors:
            values = rng.standard_normal(tensor.shape) * 1.3 / math.sqrt(tensor.shape[1])
            tensors[tensor.names[0]] = values.astype(np.float32)
    for vector in roles.vectors:
        for part in vector.parts:
            tensors[part.names[0]] = rng.normal(1, 0.3, part.shape).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def paths(checkpoint):
    """Containers with three to twelve frames per expert, and one frame."""
    made = {}
    for name, options in {
        "raw": {"codec": "raw", "frame_bytes": 4096},
        "int8": {"codec": "raw", "quant": "int8", "frame_bytes": 2048},
        "zstd": {"codec": "zstd", "frame_bytes": 8192},
        "whole": {"codec": "raw"},
    }.items():
        made[name] = str(checkpoint / f"{name}.flash")
        convert(str(checkpoint), made[name], **options)
    return made


# ------------------------------------------------------------------------------------- routing

ROUTES = [
    # scores, chosen, ids
    ([0.0, 2.0, 1.0, 2.0], 2, [1, 3]),
    ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),  # ties go to the lowest id
    ([3.0, 1.0, 2.0, 2.0], 2, [0, 2]),
    ([-1000.0, 0.0, 1000.0, -5.0], 3, [1, 2, 3]),
    ([0.5, 0.25, 0.125, 0.0], 4, [0, 1, 2, 3]),
]


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("scores", "n", "ids"), ROUTES)
def test_the_best_are_chosen_and_weighed(scores, n, ids, normalise):
    chosen, weights = route(np.array([scores], np.float32), n, normalise=normalise)
    assert chosen.dtype == np.int32 and chosen.tolist() == [ids]
    shares = np.exp(np.array(scores) - max(scores))
    over = shares[ids].sum() if normalise else shares.sum()
    np.testing.assert_allclose(weights[0], shares[ids] / over, rtol=1e-7)


def test_a_token_is_routed_as_if_alone():
    scores = np.random.default_rng(0).standard_normal((50, 13)).astype(np.float32)
    chosen, weights = route(scores, 4, normalise=False)
    for t in range(50):
        alone = route(scores[t : t + 1].copy(), 4, normalise=False)
        np.testing.assert_array_equal(alone[0][0], chosen[t])
        np.testing.assert_array_equal(alone[1][0], weights[t])


def test_sigmoid_at_its_ends():
    found = sigmoid(np.array([-1e30, -3, 0, 3, 1e30], np.float32))
    np.testing.assert_allclose(found, [0, 1 / (1 + math.exp(3)), 0.5, 1 / (1 + math.exp(-3)), 1])


# ---------------------------------------------------------------------------------- exactness


@pytest.fixture(scope="module")
def resident(paths):
    with pytest.MonkeyPatch.context() as patch:
        return {name: run(path, patch, share=1.0) for name, path in paths.items()}


@pytest.mark.parametrize("name", ["raw", "int8", "zstd"])
@pytest.mark.parametrize(
    "settings",
    [
        {"share": 0.0},
        {"share": 0.3, "prefill_chunk": 1},
        {"share": 0.5, "prefill_chunk": 4, "storage": "pread"},
        {"share": 0.2, "mode": "sweep", "num_threads": 3},
        {"share": 0.7, "policy": "lfu", "storage": "mmap"},
    ],
    ids=str,
)
def test_bits_do_not_depend_on_how(paths, resident, monkeypatch, name, settings):
    logits, result = run(paths[name], monkeypatch, **settings)
    np.testing.assert_array_equal(logits, resident[name][0])
    assert result.tokens == resident[name][1].tokens


def test_bits_do_not_depend_on_frames(resident):
    np.testing.assert_array_equal(resident["raw"][0], resident["whole"][0])
    np.testing.assert_array_equal(resident["raw"][0], resident["zstd"][0])


@pytest.mark.parametrize("name", ["raw", "int8", "zstd"])
def test_a_chunk_of_more_experts_than_slots_comes_in_waves(paths, resident, monkeypatch, name):
    plain, waves, wanted = Demand._waves, [], set()

    def counted(self, source, extents, targets):
        found = plain(self, source, extents, targets)
        if source.name.endswith(".experts"):
            waves.append(len(found))
            wanted.update((extents.frames * source.per_frame // 48).tolist())
        return found

    monkeypatch.setattr(Demand, "_waves", counted)
    logits, result = run(paths[name], monkeypatch, share=0.1, demand_bytes=16 * KIB)
    assert max(waves) > 2 and len(wanted) > 8  # each half was used again, for most of 12 experts
    np.testing.assert_array_equal(logits, resident[name][0])
    assert result.tokens == resident[name][1].tokens


@pytest.mark.parametrize("name", ["raw", "int8", "zstd"])
@pytest.mark.parametrize(("worth", "most"), [(True, 1), (True, 3), (False, 1)])
def test_look_ahead_reads_early_and_changes_nothing(
    paths, resident, monkeypatch, name, worth, most
):
    guess = lambda self, layer, experts: worth and len(experts) > 0  # noqa: E731
    monkeypatch.setattr(look_ahead.LookAhead, "guess", guess)
    asked, prefetch = set(), WeightStore.prefetch

    def recorded(self, plane, ids, **how):
        asked.add((plane, ids.size // 48))
        prefetch(self, plane, ids, **how)

    monkeypatch.setattr(WeightStore, "prefetch", recorded)
    monkeypatch.setenv("FLASHLLM_LOOK_AHEAD", str(most))
    logits, result = run(paths[name], monkeypatch, share=0.5, whole=".router")
    np.testing.assert_array_equal(logits, resident[name][0])
    assert result.tokens == resident[name][1].tokens
    assert {plane for plane, _ in asked} == ({"layers.1.experts"} if worth else set())
    assert {n for _, n in asked} <= set(range(1, most + 1))


def test_a_layer_is_advised_while_its_guesses_come_true():
    ahead, guess = look_ahead.LookAhead(3, 2), np.array([1, 2])
    assert ahead.guess(1, guess)
    for chosen, expected in [([1, 2, 7], True), ([5, 6], False), ([1, 2], True), ([5], False)]:
        ahead.came(1, np.array(chosen))
        assert ahead.guess(1, guess) == expected
    assert not ahead.guess(2, guess[:0])


def test_kernels_agree_with_the_reference(paths, resident, monkeypatch):
    reference = run(paths["raw"], monkeypatch, share=1.0, kernels="reference")[0]
    assert np.abs(reference - resident["raw"][0]).max() <= 1e-4


# -------------------------------------------------------------------------------- what is read


@pytest.fixture
def parts(paths):
    with ExitStack() as stack:
        parts = open_parts(paths["raw"], stack, ram_budget="2GiB", pin=False, n_context=32)
        parts.store.load()
        yield parts


def step(parts, ids, *, admit):
    parts.store.begin_step(parts.model.order(with_head=False), admit=admit)
    parts.model.forward(np.array(ids, np.int32), parts.state)
    return parts.store.end_step()


def test_a_token_reads_its_experts_and_no_other(parts):
    dense = sum(
        plane.n_frames * plane.frame_bytes
        for name, plane in parts.container.planes.items()
        if name.startswith("layers.") and not name.endswith(".experts")
    )
    stats = step(parts, [7], admit=True)
    assert stats.hits == 0 and stats.misses == PER_TOKEN
    stride = parts.container.planes["layers.0.experts"].stride
    rest = stats.bytes_read - dense
    assert PER_TOKEN * stride <= rest <= 2 * PER_TOKEN * stride  # alignment and merged reads


def test_no_ring_is_planned_for_experts(parts):
    picked = {need.name for need in parts.plan.needs if need.picked}
    assert picked == {"layers.0.experts", "layers.1.experts"}


def test_a_chunk_asks_for_each_expert_once_and_leaves_the_cache_alone(paths, monkeypatch):
    asked = []
    with ExitStack() as stack:
        parts = open_parts(paths["raw"], stack, ram_budget="2GiB", n_context=32)
        parts.store.load()
        acquire = parts.store.acquire

        def recorded(plane, ids, **how):
            asked.append((plane, ids.copy()))
            return acquire(plane, ids, **how)

        monkeypatch.setattr(parts.store, "acquire", recorded)
        segment = parts.store._states["layers.0.experts"].segment
        before = segment.slot_frame.copy()
        step(parts, range(20), admit=False)
        np.testing.assert_array_equal(segment.slot_frame, before)
    assert [plane for plane, _ in asked] == ["layers.0.experts", "layers.1.experts"]
    for _, ids in asked:
        assert (np.diff(ids) > 0).all() and set(np.bincount(ids // 48)) <= {0, 48}


def test_an_expert_never_chosen_is_never_asked_for(tmp_path, monkeypatch):
    path, variant, asked = tmp_path / "m.flash", GOLDEN / "qwen3-moe", set()
    convert(str(variant), str(path))
    acquire = WeightStore.acquire

    def recorded(self, plane, ids, **how):
        asked.update((ids // 10).tolist())
        return acquire(self, plane, ids, **how)

    monkeypatch.setattr(WeightStore, "acquire", recorded)
    with LLM(str(path), ram_budget="2GiB") as llm:
        llm.logits(np.load(variant / "ids.npy").ravel())
    assert asked == set(range(7))  # of eight


# ------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("stride", "n_each", "target", "expected"),
    [
        (12288, 768, 2**18, 24),  # 288 KiB
        (12288, 1024, 2**18, 16),  # 192 KiB is nearer than 384
        (24576, 14336, 2**18, 14),
        (16, 13, 2**18, 13),
        (12288, 1409, 2**18, 1),  # a prime: whole experts would exceed a frame
        (2**21, 6, 2**18, 1),
    ],
)
def test_frames_divide_an_expert(stride, n_each, target, expected):
    found = items_per_expert_frame(stride, n_each, target)
    assert n_each % found == 0 and found == expected


def test_planes_of_a_container(paths):
    for name in ("raw", "int8", "zstd"):
        with open_container(paths[name]) as container:
            experts, router = (container.planes[f"layers.1.{n}"] for n in ("experts", "router"))
            assert experts.n_items == 12 * 48 and 48 % experts.per_frame == 0
            assert [piece.name for piece in experts.pieces] == ["gate", "up", "down"]
            assert router.n_items == 13 and router.pieces[0].weight_type == "f32"


def test_a_container_converts_again_to_the_same_planes(paths, tmp_path):
    again = tmp_path / "again.flash"
    convert(paths["zstd"], str(again), codec="raw", frame_bytes=4096)
    with open_container(again) as a, open_container(paths["raw"]) as b:
        for name, plane in b.planes.items():
            np.testing.assert_array_equal(a.planes[name].stored, plane.stored)
    with LLM(str(again), ram_budget="2GiB") as x, LLM(paths["raw"], ram_budget="2GiB") as y:
        np.testing.assert_array_equal(x.logits([1, 2, 3]), y.logits([1, 2, 3]))


def test_an_order_of_neurons_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="experts"):
        convert(str(checkpoint), str(tmp_path / "m.flash"), order={0: np.arange(80)})


# ------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"num_experts": 0}, CheckpointError, "num_experts"),
        ({"num_experts": 10**9}, CheckpointError, "num_experts"),
        ({"num_experts_per_tok": 13}, CheckpointError, "experts per token"),
        ({"mlp_gated": False}, CheckpointError, "gated"),
        ({"num_experts": 2048, "num_hidden_layers": 4096}, CheckpointError, "experts in all"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, UnsupportedError, "clip_qkv"),
        ({"mlp_only_layers": "all"}, CheckpointError, "mlp_only_layers"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, error, named):
    with pytest.raises(error, match=named):
        config_from_hf({**CONFIG, **changes})


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (0, 1, 2, 3)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"mlp_only_layers": [0, 3]}, (1, 2)),
        ({"model_type": "mixtral", "decoder_sparse_step": 2}, (0, 1, 2, 3)),
    ],
)
def test_which_layers_have_experts(changes, layers):
    config = config_from_hf({**CONFIG, "num_hidden_layers": 4, **changes})
    assert config.expert_layers == layers


def test_every_field_of_a_carried_config_is_checked():
    good = json.loads(json.dumps(config_from_hf(CONFIG).to_dict()))
    assert config_from_dict("moe", good).to_dict() == config_from_hf(CONFIG).to_dict()
    for key in ("n_experts", "n_chosen", "expert_size", "shared_size", "normalise"):
        for bad in (-1, "x", 2**40, None):
            with pytest.raises(FormatError):
                config_from_dict("moe", {**good, key: bad})
    with pytest.raises(FormatError):
        config_from_dict("moe", {**good, "expert_layers": [0, 2]})


def test_widening_is_refused_by_name_and_says_what_is_not(checkpoint, tmp_path):
    with pytest.raises(UnsupportedError, match="moe models cannot .* llama, mistral"):
        inflate(checkpoint, tmp_path / "m.flash", size_bytes=2**22)


def test_experts_with_relu_read_active_neurons_alone(tmp_path, monkeypatch):
    path = tmp_path / "relu.flash"
    convert(str(GOLDEN / "olmoe-relu"), str(path))
    with ExitStack() as stack:
        parts = open_parts(path, stack, ram_budget="2GiB", n_context=32)
        parts.store.load()
        planes, config, asked = parts.container.planes, parts.config, {}
        assert [p.name for p in planes["layers.0.experts"].pieces] == ["gate"]
        assert [p.name for p in planes["layers.0.neurons"].pieces] == ["up", "down"]
        acquire = parts.store.acquire

        def recorded(plane, ids):
            asked[plane] = ids.size
            return acquire(plane, ids)

        monkeypatch.setattr(parts.store, "acquire", recorded)
        step(parts, [5], admit=True)
        most = config.expert_size * config.n_chosen
        for layer in range(config.n_layers):
            assert asked[f"layers.{layer}.experts"] == most
            assert 0 < asked[f"layers.{layer}.neurons"] < most
            assert parts.model.counts.layers[layer] == asked[f"layers.{layer}.neurons"]
