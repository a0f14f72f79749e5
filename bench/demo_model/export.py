"""Write a trained model as a Hugging Face style folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from data import END
from model import Decoder
from safetensors.torch import save_file
from tokenizers import Tokenizer


def config(model: Decoder, dtype: torch.dtype) -> dict:
    """config.json of a Llama whose FFN has no gate (the key mlp_gated says so)."""
    c = model.cfg
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "relu" if c.gated else "relu2",
        "mlp_gated": c.gated,
        "mlp_bias": False,
        "attention_bias": False,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export(
    model: Decoder, tok: Tokenizer, out: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """model.safetensors, config.json and the tokenizer's files; lm_head is the tied embedding."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{n}": p.detach().to(dtype) for n, p in model.state_dict().items()}
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    write_json(out / "config.json", config(model, dtype))
    write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    tok.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "add_bos_token": True,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.cfg.max_positions,
        },
    )
