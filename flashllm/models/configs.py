"""The table of family configs, and the way from a config.json to one of them."""

from __future__ import annotations

from ..errors import FormatError, UnsupportedError
from ..registry import Registry
from .base import ModelConfig
from .deepseek_config import DeepSeekConfig
from .falcon_config import FalconConfig
from .fields import Fields
from .gemma_config import GemmaConfig
from .gpt2_config import GPT2Config
from .gpt_neox_config import GPTNeoXConfig
from .granite_config import GraniteConfig
from .llama_config import LlamaConfig
from .moe_config import MoEConfig
from .nemotron_config import NemotronConfig
from .opt_config import OPTConfig
from .rwkv_config import RWKVConfig

CONFIGS: Registry[type[ModelConfig]] = Registry(
    "model family",
    {
        config.family: config
        for config in (
            DeepSeekConfig, FalconConfig, GemmaConfig, GPT2Config, GPTNeoXConfig,
            GraniteConfig, LlamaConfig, MoEConfig, NemotronConfig, OPTConfig, RWKVConfig,
        )  # fmt: skip
    },
)


def config_from_hf(raw: dict, warnings: list[str] | None = None) -> ModelConfig:
    """The normalised config of a checkpoint's config.json, whatever its family.

    CheckpointError for a malformed one; UnsupportedError names a model type no family serves.
    """
    model_type = Fields(raw).text("model_type")
    for _, config in CONFIGS.items():
        if model_type in config.model_types:
            return config.from_hf(raw, warnings)
    known = ", ".join(name for _, config in CONFIGS.items() for name in config.model_types)
    raise UnsupportedError(f"model type {model_type!r} is not supported; known: {known}")


def config_from_dict(
    family: str, raw: dict, *, path: object = "config", error: type[FormatError] = FormatError
) -> ModelConfig:
    """The config a container carries; everything in `raw` is checked (see ModelConfig)."""
    if family not in CONFIGS:
        raise UnsupportedError(f"{path}: model family {family!r} is not supported")
    return CONFIGS[family].from_dict(raw, path=path, error=error)
