"""Makes the golden checkpoints of this folder: tiny random models and the logits they must give.

Needs torch and transformers, which the project itself does not; run it only to add a variant:
    python tests/golden/make_golden.py [name ...]
Each variant is a folder with the checkpoint as transformers writes it (some edited afterwards to
the older spellings), `ids.npy` (40 token ids) and `logits.npy` (float32 [40, vocab], computed in
float32 from the weights as stored).  Every one-dimensional tensor is random and the logits have a
standard deviation of 2: freshly initialised models have zero biases, unit norms and tiny logits,
and a forgotten bias would pass unseen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

HERE = Path(__file__).parent
N_PROMPT = 40
LOGITS_STD = 2.0

# Nothing is a multiple of 32, so that padded groups are met everywhere.
LLAMA = dict(
    vocab_size=64,
    hidden_size=40,
    intermediate_size=38,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
OPT = dict(
    vocab_size=64,
    hidden_size=40,
    word_embed_proj_dim=40,
    ffn_dim=50,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=62,
)
EXPERTS = dict(intermediate_size=10, moe_intermediate_size=10)
FALCON = dict(
    vocab_size=64,
    hidden_size=40,
    ffn_hidden_size=38,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
GPT2 = dict(vocab_size=64, n_embd=40, n_layer=2, n_head=4, n_inner=38, n_positions=64)
GEMMA = dict(head_dim=14, pad_token_id=0, query_pre_attn_scalar=9, sliding_window=7)
GEMMA3_ROPES = dict(
    sliding_attention=dict(rope_type="default", rope_theta=50.0),
    full_attention=dict(rope_type="linear", rope_theta=1e4, factor=2.0),
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)

YARN = dict(
    rope_type="yarn", rope_theta=1e3, factor=4.0, original_max_position_embeddings=16,
    beta_fast=3.0, beta_slow=0.2,
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e3, partial_rotary_factor=0.8,
    short_factor=[1.0, 1.1, 1.5, 2.5], long_factor=[2.0, 3.0, 4.0, 8.0],
)  # fmt: skip

LATENT = dict(
    q_lora_rank=None, kv_lora_rank=22, qk_rope_head_dim=6, qk_nope_head_dim=10, v_head_dim=7,
    n_routed_experts=5, num_experts_per_tok=2, moe_intermediate_size=10, n_shared_experts=2,
    num_key_value_heads=4,
)  # fmt: skip

# name -> (config class, overrides, dtype, edit of the written folder); the seed of a variant is its
# place, so new ones come last
VARIANTS = {
    "llama-mha": (LlamaConfig, dict(num_key_value_heads=4), "bfloat16", None),
    "llama-rope3": (LlamaConfig, dict(rope_parameters=LLAMA3_ROPE), "bfloat16", None),
    "llama-rope-linear": (
        LlamaConfig,
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=4.0)),
        "bfloat16",
        None,
    ),
    "llama-tied": (LlamaConfig, dict(tie_word_embeddings=True), "bfloat16", None),
    "llama-biases": (LlamaConfig, dict(attention_bias=True, mlp_bias=True), "bfloat16", None),
    "llama-relu": (LlamaConfig, dict(hidden_act="relu"), "float16", None),
    "llama-relu-biases": (
        LlamaConfig,
        dict(hidden_act="relu", attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5),
        "bfloat16",
        None,
    ),
    "llama-relu2": (LlamaConfig, dict(hidden_act="relu2"), "bfloat16", None),
    "llama-gelu": (LlamaConfig, dict(hidden_act="gelu_pytorch_tanh"), "bfloat16", None),
    "llama-ungated-relu2": (LlamaConfig, dict(hidden_act="relu2"), "float32", "ungated"),
    "llama-ungated-silu": (LlamaConfig, dict(mlp_bias=True), "bfloat16", "ungated"),
    "llama-head-dim": (LlamaConfig, dict(head_dim=14, eos_token_id=[2, 5]), "bfloat16", None),
    "llama-legacy": (
        LlamaConfig,
        dict(
            rope_parameters=dict(LLAMA3_ROPE, rope_theta=100.0),
            tie_word_embeddings=True,
            eos_token_id=None,
        ),
        "float32",
        "legacy",
    ),
    "llama-sharded": (LlamaConfig, {}, "bfloat16", "sharded"),
    "mistral-window": (MistralConfig, dict(sliding_window=8), "bfloat16", None),
    "mistral-no-window": (MistralConfig, dict(sliding_window=None), "bfloat16", None),
    "mistral-zero-window": (MistralConfig, dict(sliding_window=None), "float16", "zero-window"),
    "qwen2": (Qwen2Config, dict(tie_word_embeddings=True), "bfloat16", None),
    "qwen2-window": (
        Qwen2Config,
        dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
        "bfloat16",
        None,
    ),
    "qwen3": (Qwen3Config, dict(head_dim=16), "bfloat16", None),
    "qwen3-bias": (Qwen3Config, dict(head_dim=10, attention_bias=True), "bfloat16", None),
    "opt": (OPTConfig, dict(ffn_dim=42), "float32", None),
    "opt-350m-like": (
        OPTConfig,
        dict(do_layer_norm_before=False, word_embed_proj_dim=24),
        "float16",
        None,
    ),
    "opt-plain": (
        OPTConfig,
        dict(enable_bias=False, layer_norm_elementwise_affine=False, word_embed_proj_dim=24),
        "float16",
        None,
    ),
    "opt-no-final-norm": (OPTConfig, dict(_remove_final_layer_norm=True), "float16", None),
    "opt-no-prefix": (OPTConfig, {}, "float16", "no-prefix"),
    "arcee": (ArceeConfig, dict(attention_bias=True, mlp_bias=True), "bfloat16", None),
    "arcee-plain": (ArceeConfig, dict(head_dim=14), "bfloat16", None),
    "nemotron": (NemotronConfig, dict(head_dim=12), "bfloat16", None),
    "nemotron-biases": (
        NemotronConfig,
        dict(head_dim=20, attention_bias=True, mlp_bias=True, partial_rotary_factor=0.3),
        "bfloat16",
        "legacy-rotary",
    ),
    "mixtral": (MixtralConfig, dict(EXPERTS, num_local_experts=5), "bfloat16", "unchosen"),
    "mixtral-window": (
        MixtralConfig,
        dict(EXPERTS, num_local_experts=3, num_experts_per_tok=1, sliding_window=6),
        "float16",
        None,
    ),
    "qwen2-moe": (
        Qwen2MoeConfig,
        dict(EXPERTS, shared_expert_intermediate_size=18, num_experts=5, num_experts_per_tok=3,
             num_hidden_layers=3, intermediate_size=22, mlp_only_layers=[1]),
        "bfloat16",
        None,
    ),
    "qwen3-moe": (
        Qwen3MoeConfig,
        dict(EXPERTS, head_dim=10, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True,
             attention_bias=True),
        "bfloat16",
        "unchosen",
    ),
    "neox": (GPTNeoXConfig, {}, "bfloat16", "older-neox"),
    "neox-serial": (
        GPTNeoXConfig,
        dict(use_parallel_residual=False, attention_bias=False, hidden_act="relu",
             rope_parameters=dict(rope_type="default", rope_theta=1e3, partial_rotary_factor=0.6)),
        "bfloat16",
        None,
    ),
    "gpt2": (GPT2Config, dict(eos_token_id=2, bos_token_id=1), "bfloat16", None),
    "gpt2-relu": (
        GPT2Config,
        dict(activation_function="relu", n_inner=None, n_layer=1, tie_word_embeddings=False,
             eos_token_id=2, bos_token_id=1),
        "float16",
        "no-transformer-prefix",
    ),
    "olmoe": (OlmoeConfig, dict(EXPERTS, num_experts=8, num_experts_per_tok=2), "bfloat16", None),
    "phi3": (Phi3Config, dict(sliding_window=9, pad_token_id=0), "bfloat16", None),
    "phi3-longrope": (
        Phi3Config,
        dict(rope_parameters=LONGROPE, max_position_embeddings=256, pad_token_id=0,
             original_max_position_embeddings=64, hidden_act="relu"),
        "float16",
        None,
    ),
    "llama-yarn": (LlamaConfig, dict(rope_parameters=YARN), "bfloat16", None),
    "qwen3-yarn": (
        Qwen3Config,
        dict(head_dim=16, rope_parameters=dict(YARN, attention_factor=1.3, truncate=False)),
        "bfloat16",
        None,
    ),
    "falcon": (
        FalconConfig,
        dict(new_decoder_architecture=True, num_kv_heads=2, bias=True, activation="relu"),
        "bfloat16",
        None,
    ),
    "falcon-one-norm": (
        FalconConfig,
        dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1,
             tie_word_embeddings=False),
        "bfloat16",
        None,
    ),
    "falcon-multi-query": (FalconConfig, dict(ffn_hidden_size=None), "bfloat16", None),
    "falcon-serial": (
        FalconConfig,
        dict(parallel_attn=False, multi_query=False, activation="relu",
             rope_parameters=dict(rope_type="default", rope_theta=1e3)),
        "float16",
        None,
    ),
    "gemma": (GemmaConfig, dict(head_dim=14, pad_token_id=0), "bfloat16", "gelu"),
    "gemma2": (
        Gemma2Config,
        dict(GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        "bfloat16",
        None,
    ),
    "gemma2-relu": (
        Gemma2Config,
        dict(GEMMA, hidden_activation="relu", attn_logit_softcapping=None, attention_bias=True),
        "float16",
        "no-prefix",
    ),
    "gemma3": (
        Gemma3TextConfig,
        dict(GEMMA, rope_parameters=GEMMA3_ROPES,
             layer_types=["sliding_attention", "full_attention"]),
        "bfloat16",
        None,
    ),
    "gemma3-older": (
        Gemma3TextConfig,
        dict(GEMMA, rope_parameters=GEMMA3_ROPES, num_hidden_layers=3, sliding_window_pattern=2,
             final_logit_softcapping=4.0),
        "bfloat16",
        "older-gemma3",
    ),
    "qwen3-moe-fused": (
        Qwen3MoeConfig,
        dict(EXPERTS, head_dim=10, num_experts=5, num_experts_per_tok=2, mlp_only_layers=[1],
             intermediate_size=14),
        "float16",
        "fused-experts",
    ),
    "deepseek": (
        DeepseekV2Config,
        dict(LATENT, rope_parameters=dict(YARN, mscale=0.7, mscale_all_dim=1.1),
             routed_scaling_factor=1.7, first_k_dense_replace=1, num_hidden_layers=3),
        "bfloat16",
        None,
    ),
    "deepseek-plain-rope": (
        DeepseekV2Config,
        dict(LATENT, n_shared_experts=1, num_experts_per_tok=1),
        "float16",
        None,
    ),
    "olmoe-relu": (
        OlmoeConfig,
        dict(EXPERTS, hidden_act="relu", num_experts=8, num_experts_per_tok=2),
        "bfloat16",
        "unchosen",
    ),
    "qwen2-moe-relu2": (
        Qwen2MoeConfig,
        dict(EXPERTS, shared_expert_intermediate_size=18, num_experts=5, num_experts_per_tok=3,
             num_hidden_layers=3, intermediate_size=22, mlp_only_layers=[1], hidden_act="relu2"),
        "float16",
        "fused-experts",
    ),
    "granite": (
        GraniteConfig,
        dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.22,
             logits_scaling=8.0, attention_bias=True, mlp_bias=True),
        "bfloat16",
        None,
    ),
    "granite-tied": (
        GraniteConfig,
        dict(embedding_multiplier=12.0, attention_multiplier=0.0625, tie_word_embeddings=True),
        "float16",
        None,
    ),
}


class UngatedMLP(torch.nn.Module):
    """down(act(up(x))): not in transformers' Llama; our config key is `mlp_gated: false`."""

    def __init__(self, gated):
        super().__init__()
        self.up_proj, self.down_proj, self.act_fn = gated.up_proj, gated.down_proj, gated.act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)))


def randomise(model, generator):
    for tensor in model.parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 1:
            # norm weights and biases alike: around 1 for weights, around 0 for biases
            centre = 1.0 if tensor.detach().mean() > 0.5 else 0.0
            tensor.data = centre + 0.4 * noise
        else:
            tensor.data = noise * (1.3 / tensor.shape[1] ** 0.5)


def forget_last_expert(model):
    """Experts in opposite pairs, as many pairs as are chosen, and a last one that scores 0: one of
    each pair scores more, so the last is never chosen."""
    for name, tensor in model.named_parameters():
        if name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight")):
            tensor.data[1:-1:2] = -tensor.data[0:-2:2]
            tensor.data[-1] = 0


def last_scalable(model):
    """Tensors whose scale is the scale of the logits and of nothing else."""
    if not model.config.tie_word_embeddings:
        return [model.get_output_embeddings().weight]
    if hasattr(model, "transformer"):
        return list(model.transformer.ln_f.parameters())
    decoder = getattr(model.model, "decoder", model.model)
    if getattr(decoder, "project_out", None) is not None:
        return [decoder.project_out.weight]
    norm = getattr(decoder, "norm", None) or getattr(decoder, "final_layer_norm", None)
    if norm is None:
        return None
    return list(norm.parameters())


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None].long()).logits[0].float().numpy()


def build(config, dtype, seed, edit=None):
    """A random model in float32 whose values are exact in `dtype`, its prompt and its logits."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    if hasattr(config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the others want multiples of 16 bytes
    if edit == "ungated":
        for layer in model.model.layers:
            layer.mlp = UngatedMLP(layer.mlp)
    randomise(model, generator)
    if edit == "unchosen":
        forget_last_expert(model)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, N_PROMPT).astype(np.int32)
    scalable = last_scalable(model)
    if scalable is not None:
        factor = LOGITS_STD / float(logits_of(model, ids).std())
        for tensor in scalable:
            tensor.data *= factor
    for tensor in model.parameters():
        tensor.data = tensor.data.to(getattr(torch, dtype)).float()
    logits = logits_of(model, ids)
    assert logits.std() > 1, logits.std()
    return model, ids, logits


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1, sort_keys=True))


def to_legacy(config):
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = dict(rope, type=rope["rope_type"])
    config["torch_dtype"] = config.pop("dtype")
    config["head_dim"] = None


def to_legacy_rotary(config):
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    config["partial_rotary_factor"] = rope["partial_rotary_factor"]


def to_older_neox(config):
    rope = config.pop("rope_parameters")
    config["rotary_emb_base"] = rope["rope_theta"]
    config["rotary_pct"] = rope["partial_rotary_factor"]


def to_older_gemma3(config):
    ropes = config.pop("rope_parameters")
    config["rope_theta"] = ropes["full_attention"].pop("rope_theta")
    config["rope_scaling"] = ropes["full_attention"]
    config["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    del config["layer_types"]
    config["sliding_window_pattern"] = 2


def with_fused_experts(tensors):
    """All experts of a layer in two tensors, as transformers keeps them in memory."""
    experts = {}
    for name in [name for name in tensors if ".experts." in name]:
        home, number, piece, _ = name.rsplit(".", 3)
        experts.setdefault(home, {}).setdefault(int(number), {})[piece] = tensors.pop(name)
    for home, by_number in experts.items():
        each = [pieces for _, pieces in sorted(by_number.items())]
        both = [torch.cat([pieces["gate_proj"], pieces["up_proj"]]) for pieces in each]
        tensors[f"{home}.gate_up_proj"] = torch.stack(both)
        tensors[f"{home}.down_proj"] = torch.stack([pieces["down_proj"] for pieces in each])
    return tensors


def write(model, dtype, folder, edit=None):
    from safetensors.torch import load_file, save_file

    model = model.to(getattr(torch, dtype))
    model.config.dtype = dtype
    shards = {"max_shard_size": "20kB"} if edit == "sharded" else {}
    model.save_pretrained(folder, **shards)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if edit == "ungated":
        edit_json(config, lambda c: c.update(mlp_gated=False))
    elif edit == "zero-window":
        edit_json(config, lambda c: c.update(sliding_window=0))
    elif edit == "legacy-rotary":
        edit_json(config, to_legacy_rotary)
    elif edit == "gelu":  # the first checkpoints' word for the tanh form
        edit_json(config, lambda c: c.update(hidden_act="gelu"))
    elif edit == "older-gemma3":
        edit_json(config, to_older_gemma3)
    elif edit == "older-neox":
        edit_json(config, to_older_neox)
    elif edit == "legacy":
        edit_json(config, to_legacy)
        tensors = load_file(weights)
        # as one real checkpoint has it: the tied matrix under the head's name only
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif edit == "fused-experts":
        save_file(with_fused_experts(load_file(weights)), weights)
    elif edit == "no-transformer-prefix":
        tensors = load_file(weights)
        save_file({k.removeprefix("transformer."): v for k, v in tensors.items()}, weights)
    elif edit == "no-prefix":
        tensors = load_file(weights)
        save_file({k.removeprefix("model."): v for k, v in tensors.items()}, weights)


def make(name, folder, seed):
    config_class, overrides, dtype, edit = VARIANTS[name]
    base = {OPTConfig: OPT, GPT2Config: GPT2, FalconConfig: FALCON}.get(config_class, LLAMA)
    config = config_class(**{**base, **overrides})
    model, ids, logits = build(config, dtype, seed, edit)
    folder.mkdir(parents=True, exist_ok=True)
    write(model, dtype, folder, edit)
    np.save(folder / "ids.npy", ids)
    np.save(folder / "logits.npy", logits)
    return logits


if __name__ == "__main__":
    for name in sys.argv[1:] or VARIANTS:
        logits = make(name, HERE / name, seed=list(VARIANTS).index(name))
        size = sum(f.stat().st_size for f in (HERE / name).iterdir())
        print(f"{name:22} logits std {logits.std():.2f}  {size / 1e3:.0f} kB")
