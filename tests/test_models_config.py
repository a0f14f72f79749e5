"""Configs of the llama and opt families: every spelling, every refusal, and the way back."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from flashllm.checkpoints import open_checkpoint, part_of
from flashllm.errors import CheckpointError, FormatError, UnsupportedError
from flashllm.models.base import ACTIVATIONS
from flashllm.models.configs import config_from_dict, config_from_hf

GOLDEN = sorted(p.parent for p in (Path(__file__).parent / "golden").glob("*/config.json"))
LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "eos_token_id": 2,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 100,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}
FALCON = {
    "model_type": "falcon",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "eos_token_id": 2,
}
GEMMA = {**LLAMA, "model_type": "gemma2", "num_hidden_layers": 4, "head_dim": 16}
GRANITE = {**LLAMA, "model_type": "granite", "logits_scaling": 8.0}
DEEPSEEK = {
    **LLAMA,
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}


def llama(**changes):
    return config_from_hf({**LLAMA, **changes})


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.name)
def test_roles_cover_a_real_checkpoint_exactly(folder):
    checkpoint = open_checkpoint(folder)
    config = config_from_hf(checkpoint.config)
    roles = config.roles()
    tensors = [tensor for plane in roles.planes for _, tensor in plane.tensors]
    tensors += [part for vector in roles.vectors for part in vector.parts]
    used = {next(n for n in tensor.names if n in checkpoint): tensor for tensor in tensors}
    assert {(part_of(name) or [name])[0] for name in used} == set(checkpoint.names())
    for name, tensor in used.items():
        assert checkpoint.shape(name) == tensor.shape, name
    for plane in roles.planes:
        assert len({tensor.n_cols for _, tensor in plane.tensors}) == 1 or plane.kind == "bundles"


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.name)
def test_dictionary_round_trip_is_exact(folder):
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    raw = json.loads(json.dumps(config.to_dict()))
    assert config_from_dict(config.family, raw) == config


def test_older_and_newer_spellings_agree():
    old = llama(rope_theta=500000.0, rope_scaling=None, torch_dtype="float16", head_dim=None)
    new = llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, dtype="float16")
    assert old == new and old.head_dim == 16
    stated = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stated["original_max_position_embeddings"] = 64
    old = llama(rope_theta=1e4, rope_scaling={"type": "llama3", **stated})
    new = llama(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, **stated})
    assert old == new and new.rope.kind == "llama3"
    assert llama(rope_scaling={"rope_type": "linear", "factor": 2}).rope.factor == 2.0
    assert llama(partial_rotary_factor=0.5).rope.n_rotated == 8
    assert llama(rope_parameters={"partial_rotary_factor": 0.25}).rope.n_rotated == 4


def test_llama3_frequencies_keep_the_fast_and_slow_the_slow():
    plain = llama(max_position_embeddings=64).rope.inverse_frequencies()
    stated = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaled = llama(
        rope_parameters={**stated, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    ).rope.inverse_frequencies()
    turns = 64 / (2 * math.pi / plain.astype(np.float64))
    assert np.array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


def test_longrope_is_served_within_its_original_context():
    stated = {"rope_type": "su", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    raw = {**LLAMA, "model_type": "phi3", "rope_scaling": stated}
    for original, n_context, n_warnings in ((32, 32, 1), (128, 128, 0)):
        warnings = []
        raw["original_max_position_embeddings"] = original
        config = config_from_hf(raw, warnings)
        assert config.n_context == n_context and config.rope.kind == "longrope"
        assert len(warnings) == n_warnings and all("longrope" in text for text in warnings)
        grown = math.sqrt(1 + math.log(128 / original) / math.log(original))
        assert config.rope.attention_factor == grown


def test_a_rope_without_the_newer_fields_is_read():
    good = json.loads(json.dumps(llama().to_dict()))
    for key in ("beta_fast", "beta_slow", "truncate", "attention_factor", "factors"):
        del good["rope"][key]
    assert config_from_dict("llama", good) == llama()


def test_what_gemma_means_where_its_config_is_silent_or_null():
    silent = config_from_hf(GEMMA)
    assert silent.windows == (4096, 0, 4096, 0) and silent.tied and silent.sandwich
    assert (silent.attention_cap, silent.logit_cap, silent.query_scalar) == (50.0, 30.0, 256.0)
    nulls = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    none = config_from_hf({**GEMMA, **nulls, "sliding_window": None})
    assert none.windows == (0,) * 4 and none.attention_cap == none.logit_cap == 0.0
    third = config_from_hf({**GEMMA, "model_type": "gemma3_text", "sliding_window": 512})
    assert third.windows == (512,) * 4 and third.logit_cap == 0.0 and third.qk_norm
    assert (third.rope.theta, third.local_rope.theta) == (1e6, 1e4)
    first = config_from_hf({**GEMMA, "model_type": "gemma", "hidden_act": "gelu"})
    assert first.activation == "gelu_tanh" and not first.sandwich and first.query_scalar == 16.0


BIASES = [
    # model type, key, (qkv, o, mlp, qk_norm)
    ("llama", {}, (False, False, False, False)),
    ("llama", {"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
    ("mistral", {"attention_bias": True, "mlp_bias": True}, (False, False, False, False)),
    ("qwen2", {}, (True, False, False, False)),
    ("qwen3", {"head_dim": 16}, (False, False, False, True)),
    ("qwen3", {"attention_bias": True}, (True, True, False, True)),
]


@pytest.mark.parametrize(("model_type", "keys", "expected"), BIASES)
def test_biases_of_each_model_type(model_type, keys, expected):
    config = llama(model_type=model_type, **keys)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == expected


WINDOWS = [
    ("mistral", {"sliding_window": None}, (0, 0, 0)),
    ("mistral", {"sliding_window": 0}, (0, 0, 0)),
    ("mistral", {"sliding_window": 4096}, (4096,) * 3),
    ("llama", {"sliding_window": 4096}, (0, 0, 0)),
    ("qwen2", {"sliding_window": 32, "max_window_layers": 1}, (0, 0, 0)),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        (0, 32, 32),
    ),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        (8, 0, 8),
    ),
]


@pytest.mark.parametrize(("model_type", "keys", "expected"), WINDOWS)
def test_windows_per_layer(model_type, keys, expected):
    assert llama(model_type=model_type, **keys).windows == expected


def test_heads_where_the_config_is_silent():
    silent = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert config_from_hf(silent).n_kv_heads == 4
    assert llama(num_key_value_heads=None).n_kv_heads == 4
    assert llama(model_type="qwen3").head_dim == 128
    assert llama(head_dim=24).head_dim == 24


def test_eos_is_a_number_a_list_or_a_warning():
    for value, ids, n_warnings in (
        (2, (2,), 0),
        ([2, 5, 2], (2, 5), 0),
        (None, (), 1),
        (100, (), 1),
        ([-1, 3], (3,), 1),
    ):
        warnings = []
        config = config_from_hf({**LLAMA, "eos_token_id": value}, warnings)
        assert config.eos_ids == ids and len(warnings) == n_warnings, value


def test_activation_spellings_and_sparsity():
    for name, spellings in ACTIVATIONS.items():
        for spelling in spellings:
            config = llama(hidden_act=spelling)
            assert config.activation == name
            assert config.sparse == (name in ("relu", "relu2"))


FFN_PLANES = [
    # activation, gated, deciding tensor, pieces of a bundle
    ("relu", True, "gate_proj", ["up", "down"]),
    ("relu2", False, "up_proj", ["down"]),
    ("silu", True, None, ["gate", "up", "down"]),
    ("gelu", False, None, ["up", "down"]),
]


@pytest.mark.parametrize(("activation", "gated", "deciding", "pieces"), FFN_PLANES)
def test_ffn_planes_follow_the_activation(activation, gated, deciding, pieces):
    planes = {p.name: p for p in llama(hidden_act=activation, mlp_gated=gated).roles().planes}
    ffn = planes["layers.1.ffn"]
    assert [name for name, _ in ffn.tensors] == pieces and ffn.n_items == 96
    assert ffn.use == ("sparse" if deciding else "dense")
    if deciding:
        assert deciding in planes["layers.1.deciding"].tensors[0][1].names[0]
    else:
        assert "layers.1.deciding" not in planes


REFUSALS = [
    (LLAMA, {"model_type": "mamba"}, "mamba"),
    (LLAMA, {"hidden_act": "tanh"}, "tanh"),
    (LLAMA, {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "ntk"),
    (LLAMA, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "per kind of layer"),
    (OPT, {"activation_function": "quick_gelu"}, "quick_gelu"),
    (FALCON, {"alibi": True}, "ALiBi"),
    (GEMMA, {"use_bidirectional_attention": True}, "bidirectional"),
    (GEMMA, {"model_type": "gemma3_text", "attn_logit_softcapping": 9.0}, "capped scores"),
    (GEMMA, {"model_type": "gemma3"}, "gemma3"),
    (DEEPSEEK, {"q_lora_rank": 1536}, "low-rank projection"),
    (DEEPSEEK, {"topk_method": "group_limited_greedy"}, "by groups"),
    (DEEPSEEK, {"norm_topk_prob": True}, "normalised weights"),
    (DEEPSEEK, {"scoring_func": "sigmoid"}, "scoring_func"),
    (DEEPSEEK, {"model_type": "deepseek_v3"}, "deepseek_v3"),
    (GRANITE, {"model_type": "granitemoe"}, "granitemoe"),
]


@pytest.mark.parametrize(("base", "changes", "named"), REFUSALS)
def test_what_is_not_computed_is_refused_by_name(base, changes, named):
    with pytest.raises(UnsupportedError, match=named):
        config_from_hf({**base, **changes})


HOSTILE = [0, -1, 2**40, 2**70, 1.5, "8", True, [], {}, float("nan")]
COUNTS = [
    (LLAMA, "vocab_size"),
    (LLAMA, "hidden_size"),
    (LLAMA, "intermediate_size"),
    (LLAMA, "num_hidden_layers"),
    (LLAMA, "num_attention_heads"),
    (LLAMA, "num_key_value_heads"),
    (LLAMA, "head_dim"),
    (LLAMA, "max_position_embeddings"),
    (OPT, "ffn_dim"),
    (OPT, "word_embed_proj_dim"),
    (FALCON, "ffn_hidden_size"),
]


@pytest.mark.parametrize(("base", "key"), COUNTS)
def test_hostile_counts_name_the_key(base, key):
    for value in HOSTILE:
        with pytest.raises(CheckpointError, match=key):
            config_from_hf({**base, key: value})


MALFORMED = [
    (LLAMA, {"num_key_value_heads": 3}),
    (LLAMA, {"rms_norm_eps": float("inf")}),
    (LLAMA, {"rms_norm_eps": "x"}),
    (LLAMA, {"attention_bias": 1}),
    (LLAMA, {"tie_word_embeddings": "yes"}),
    (LLAMA, {"rope_theta": -1.0}),
    (LLAMA, {"rope_scaling": {"rope_type": "linear"}}),
    (LLAMA, {"rope_scaling": [1]}),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 2}}),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": "4"}}),
    (LLAMA, {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0] * 8}}),
    (LLAMA, {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 7}}),
    (LLAMA, {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 7 + [0.0]}}),
    (LLAMA, {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 7 + ["1"]}}),
    (LLAMA, {"partial_rotary_factor": 0.2}),
    (LLAMA, {"eos_token_id": "2"}),
    (LLAMA, {"hidden_act": 3}),
    (LLAMA, {"hidden_size": 66, "head_dim": None}),
    (LLAMA, {"vocab_size": None}),
    (OPT, {"hidden_size": 66}),
    (FALCON, {"hidden_size": 66}),
    (FALCON, {"new_decoder_architecture": True, "num_kv_heads": 3}),
    (OPT, {"do_layer_norm_before": 0}),
    (GRANITE, {"attention_multiplier": 0}),
    (GRANITE, {"logits_scaling": "8"}),
    (GRANITE, {"residual_multiplier": float("inf")}),
    ({**LLAMA, "model_type": "qwen2", "use_sliding_window": True}, {"layer_types": ["x"]}),
]


@pytest.mark.parametrize(("base", "changes"), MALFORMED)
def test_malformed_configs_are_typed_errors(base, changes):
    with pytest.raises(CheckpointError):
        config_from_hf({**base, **changes})


@pytest.mark.parametrize("raw", [None, [], {}, "llama", {"model_type": 1}])
def test_no_config_is_a_typed_error(raw):
    with pytest.raises(CheckpointError):
        config_from_hf(raw)


BASES = [LLAMA, OPT, FALCON, GEMMA, DEEPSEEK, GRANITE]


@pytest.mark.parametrize("base", BASES, ids=lambda base: base["model_type"])
def test_every_field_of_a_carried_config_is_checked(base):
    config = config_from_hf(base)
    good = json.loads(json.dumps(config.to_dict()))
    for key in good:
        with pytest.raises(FormatError):
            config_from_dict(config.family, {k: v for k, v in good.items() if k != key})
        for value in (-1, 2**70, "wrong", [-1], {"kind": "x"}, 1e400):
            if good[key] == value:
                continue
            with pytest.raises(FormatError):
                config_from_dict(config.family, {**good, key: value})
    with pytest.raises(FormatError, match="surprise"):
        config_from_dict(config.family, {**good, "surprise": 1})
    with pytest.raises(UnsupportedError, match="nothing"):
        config_from_dict("nothing", good)
