"""The llama family's config and roles: Llama 2/3, Mistral, Qwen2, dense Qwen3, Arcee, Phi-3.

RMSNorm, rotary attention with grouped key/value heads, a gated FFN down(act(gate(x)) * up(x)) or,
with our own config key `"mlp_gated": false`, an ungated one down(act(up(x))).  What differs between
the model types is which biases exist, whether q and k are normed per head, and which layers attend
through a window; all of it is normalised here, so that nobody else asks for the model type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UnsupportedError
from .base import (
    ModelConfig,
    PlaneRole,
    Roles,
    TensorRole,
    VectorRole,
    activation_name,
    check_heads,
    common_from_dict,
    ffn_planes,
    hf_ends,
    hf_head_dim,
    hf_sizes,
    rows,
    rows_of,
)
from .fields import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_WIDTH, Fields
from .rope import Rope, rope_from_dict, rope_from_hf

# Used where config.json is silent, as the checkpoints' own configuration classes have them.
_DEFAULT_KV_HEADS = {"mistral": 8, "mixtral": 8}
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_EPS = {"arcee": 1e-5, "mixtral": 1e-5, "olmoe": 1e-5, "phi3": 1e-5}
_DEFAULT_ROTATED = {"nemotron": 0.5}
_DEFAULT_ACTIVATION = {"arcee": "relu2", "nemotron": "relu2"}
_UNGATED = ("arcee", "nemotron")
_OPTIONAL_BIAS = ("llama", "arcee", "nemotron", "granite")  # of attention and FFN alike
_ALWAYS_WINDOWED = ("mistral", "mixtral", "phi3")
_FUSED = ("phi3",)  # q, k and v in one tensor, and gate and up
_MAY_BE_WINDOWED = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """`windows`: per layer the number of keys a token sees, itself included; 0 is all of them."""

    family: ClassVar[str] = "llama"
    model_types: ClassVar[tuple[str, ...]] = (
        "llama", "mistral", "qwen2", "qwen3", "arcee", "phi3",
    )  # fmt: skip

    rope: Rope
    windows: tuple[int, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @classmethod
    def values_from_hf(cls, source: Fields, notes: list[str]) -> dict[str, Any]:
        raw, model_type = source.raw, source.text("model_type")
        vocab_size, hidden_size, n_layers, n_heads = hf_sizes(source)
        n_context = source.integer("max_position_embeddings", 1, MAX_CONTEXT, 2048)
        head_dim = source.integer("head_dim", 1, 2**14, _DEFAULT_HEAD_DIM.get(model_type))
        if head_dim is None:
            head_dim = hf_head_dim(source, hidden_size, n_heads)
        n_kv_heads = n_heads
        if "num_key_value_heads" not in raw:
            n_kv_heads = _DEFAULT_KV_HEADS.get(model_type, n_heads)
        n_kv_heads = source.integer("num_key_value_heads", 1, MAX_HEADS, n_kv_heads)
        check_heads(source, n_heads, n_kv_heads)
        rope = rope_from_hf(
            source, head_dim, n_context, rotated=_DEFAULT_ROTATED.get(model_type, 1.0)
        )
        if rope.kind == "longrope" and n_context > rope.original_n_context:
            # its long factors hold for whole sequences of a length, not for positions: the first
            # tokens of a sequence would have to be computed anew when it passes that length
            n_context = rope.original_n_context
            notes.append(f"longrope is computed for its original {n_context} tokens, not beyond")
        attention_bias = source.flag("attention_bias", False)
        attention_bias = attention_bias and model_type in (*_OPTIONAL_BIAS, "qwen3")
        return {
            "model_type": model_type,
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": source.integer("intermediate_size", 1, MAX_WIDTH),
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "head_dim": head_dim,
            "n_context": n_context,
            "norm_eps": source.number("rms_norm_eps", 0.0, 1.0, _DEFAULT_EPS.get(model_type, 1e-6)),
            "activation": activation_name(
                source.text("hidden_act", _DEFAULT_ACTIVATION.get(model_type, "silu"))
            ),
            "gated": source.flag("mlp_gated", True) and model_type not in _UNGATED,
            "tied": source.flag("tie_word_embeddings", False),
            **hf_ends(source, vocab_size, notes),
            "rope": rope,
            "windows": _windows(source, model_type, n_layers, notes),
            "qkv_bias": attention_bias or model_type == "qwen2",
            "o_bias": attention_bias,
            "mlp_bias": model_type in _OPTIONAL_BIAS and source.flag("mlp_bias", False),
            "qk_norm": model_type == "qwen3",
        }

    @classmethod
    def values_from_dict(cls, source: Fields) -> dict[str, Any]:
        values = common_from_dict(source, cls.model_types)
        values["rope"] = rope_from_dict(source, values["head_dim"])
        values["windows"] = source.integers("windows", 0, MAX_CONTEXT, MAX_LAYERS)
        if len(values["windows"]) != values["n_layers"]:
            raise source.fail("windows", f"one per layer ({values['n_layers']})", values["windows"])
        for key in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm"):
            values[key] = source.flag(key)
        return values

    @property
    def layer_norms(self) -> dict[str, str]:
        """Our names of a layer's norms, and the checkpoint's."""
        return {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}

    @property
    def qk_norm_widths(self) -> tuple[int, int]:
        """Values that one norm of q, and of k, runs over."""
        return self.head_dim, self.head_dim

    def roles(self) -> Roles:
        h, n_qkv = self.hidden_size, self.n_heads * self.head_dim
        embedding = ("model.embed_tokens.weight", "embed_tokens.weight")
        head = ("lm_head.weight",)
        vocab = (self.vocab_size, h)
        planes = [
            rows(
                "embed",
                # some tied checkpoints keep the one matrix under the head's name only
                TensorRole(embedding + (head if self.tied else ()), vocab),
                "dense" if self.tied else "embed",
            )
        ]
        vectors: list[VectorRole] = []
        for i in range(self.n_layers):
            planes += self._layer_planes(i, n_qkv)
            vectors += self._layer_vectors(i, n_qkv)
        vectors.append(VectorRole("final_norm.weight", (_tensor("norm.weight", h),)))
        if not self.tied:
            planes.append(rows("head", TensorRole(head, vocab)))
        return Roles(tuple(planes), tuple(vectors), (r".*rotary_emb\.inv_freq",))

    def _layer_planes(self, i: int, n_q: int) -> list[PlaneRole]:
        h, n, n_kv = self.hidden_size, self.intermediate_size, self.n_kv_heads * self.head_dim
        attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        qkv, gate_up = (("q", n_q), ("k", n_kv), ("v", n_kv)), (("gate", n), ("up", n))
        down = ("down", _tensor(f"{mlp}.down_proj.weight", h, n, transposed=True))
        if self.model_type in _FUSED:
            qkv = _fused(f"{attention}.{{}}_proj.weight", qkv, h)
            gate_up = _fused(f"{mlp}.{{}}_proj.weight", gate_up, h)
        else:
            qkv = tuple((p, _tensor(f"{attention}.{p}_proj.weight", k, h)) for p, k in qkv)
            gate_up = tuple((p, _tensor(f"{mlp}.{p}_proj.weight", k, h)) for p, k in gate_up)
        pieces = (*gate_up, down) if self.gated else (gate_up[1], down)
        return [
            PlaneRole(f"layers.{i}.qkv", "rows", "dense", qkv),
            rows(f"layers.{i}.o", _tensor(f"{attention}.o_proj.weight", h, n_q)),
            *ffn_planes(f"layers.{i}", pieces, sparse=self.sparse),
        ]

    def _layer_vectors(self, i: int, n_q: int) -> list[VectorRole]:
        h, n, n_kv = self.hidden_size, self.intermediate_size, self.n_kv_heads * self.head_dim
        attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        found = {
            f"{ours}.weight": (_tensor(f"layers.{i}.{theirs}.weight", h),)
            for ours, theirs in self.layer_norms.items()
        }
        if self.qkv_bias:
            found["qkv.bias"] = (
                _tensor(f"{attention}.q_proj.bias", n_q),
                _tensor(f"{attention}.k_proj.bias", n_kv),
                _tensor(f"{attention}.v_proj.bias", n_kv),
            )
        if self.o_bias:
            found["o.bias"] = (_tensor(f"{attention}.o_proj.bias", h),)
        if self.qk_norm:
            for part, width in zip("qk", self.qk_norm_widths, strict=True):
                name = f"{part}_norm.weight"
                found[name] = (_tensor(f"{attention}.{name}", width),)
        if self.mlp_bias:
            biases = {"gate": _tensor(f"{mlp}.gate_proj.bias", n)} if self.gated else {}
            biases["up"] = _tensor(f"{mlp}.up_proj.bias", n)
            if self.sparse:
                found["deciding.bias"] = (biases.pop("gate" if self.gated else "up"),)
            found |= {f"{name}.bias": (tensor,) for name, tensor in biases.items()}
            found["ffn.bias"] = (_tensor(f"{mlp}.down_proj.bias", h),)
        return [VectorRole(f"layers.{i}.{name}", parts) for name, parts in found.items()]


def stem(name: str) -> tuple[str, ...]:
    """A tensor's spellings: bare base models are saved without the "model." prefix."""
    return (f"model.{name}", name)


def _tensor(name: str, *shape: int, transposed: bool = False) -> TensorRole:
    return TensorRole(stem(name), shape, transposed)


def _fused(
    name: str, parts: tuple[tuple[str, int], ...], n_cols: int
) -> tuple[tuple[str, TensorRole], ...]:
    """Parts (name, rows) of one tensor, whose name is `name` with all of theirs joined by "_" or,
    for q, k and v, not joined; separate tensors are found too."""
    joined = name.format("qkv" if parts[0][0] == "q" else "_".join(part for part, _ in parts))
    n_rows, start, found = sum(n for _, n in parts), 0, []
    for part, n in parts:
        names = stem(name.format(part)) + rows_of(stem(joined), start, n, n_rows)
        found.append((part, TensorRole(names, (n, n_cols))))
        start += n
    return tuple(found)


def _windows(source: Fields, model_type: str, n_layers: int, notes: list[str]) -> tuple[int, ...]:
    """The attention window of every layer; 0 where it sees everything."""
    window = source.integer("sliding_window", 0, MAX_CONTEXT, 0)
    if model_type in _ALWAYS_WINDOWED:
        return (window,) * n_layers
    if model_type not in _MAY_BE_WINDOWED or not source.flag("use_sliding_window", False):
        return (0,) * n_layers
    if source.get("layer_types") is None:
        first = source.integer("max_window_layers", 0, MAX_LAYERS, 28)
        return tuple(window if i >= first else 0 for i in range(n_layers))
    return typed_windows(source, n_layers, window, notes)


def typed_windows(
    source: Fields, n_layers: int, window: int, notes: list[str]
) -> tuple[int, ...]:
    """The windows of a config that names every layer's type."""
    layer_types = source.get("layer_types")
    if not isinstance(layer_types, list) or len(layer_types) != n_layers:
        raise source.fail("layer_types", f"a list of {n_layers}", layer_types)
    for name in layer_types:
        if name not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(f"{source.path}: layer type {name!r} is not supported")
    if "sliding_attention" in layer_types and not window:
        notes.append("layer_types names sliding attention but there is no window; ignored")
    return tuple(window if name == "sliding_attention" else 0 for name in layer_types)
