"""Families by the name a container carries; their configs and roles are in configs.py."""

from __future__ import annotations

from ..registry import Registry
from .decoder import DecoderModel
from .deepseek import DeepSeekModel
from .gemma import GemmaModel
from .gpt_neox import GPTNeoXModel
from .granite import GraniteModel
from .llama import LlamaModel
from .moe import MoEModel
from .nemotron import NemotronModel
from .opt import OPTModel
from .rwkv import RWKVModel

MODELS: Registry[type[DecoderModel]] = Registry(
    "model family",
    {
        "deepseek": DeepSeekModel,
        "falcon": GPTNeoXModel,  # the same pass; only config and tensors differ
        "gemma": GemmaModel,
        "gpt2": OPTModel,  # likewise
        "gpt_neox": GPTNeoXModel,
        "granite": GraniteModel,
        "llama": LlamaModel,
        "moe": MoEModel,
        "nemotron": NemotronModel,
        "opt": OPTModel,
        "rwkv": RWKVModel,
    },
)
