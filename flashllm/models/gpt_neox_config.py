"""The GPT-NeoX family's config and tensor roles: GPT-NeoX-20B and Pythia (arXiv 2204.06745).

LayerNorms with bias, rotary attention over part of each head, one matrix for queries, keys and
values whose rows are grouped by head, an ungated FFN, and, unless the config says otherwise,
attention and FFN side by side: both read the layer's input and are added to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import FormatError
from .base import (
    ModelConfig,
    PlaneRole,
    Roles,
    TensorRole,
    VectorRole,
    activation_name,
    common_from_dict,
    hf_sizes,
    known_keys_only,
)
from .fields import MAX_CONTEXT, MAX_WIDTH, Fields, token_ids
from .rope import Rope, rope_from_dict, rope_from_hf


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(ModelConfig):
    """`parallel`: attention and FFN side by side; `bias`: attention has biases (the FFN always)."""

    family: ClassVar[str] = "gpt_neox"
    model_types: ClassVar[tuple[str, ...]] = ("gpt_neox",)

    rope: Rope
    parallel: bool
    bias: bool

    @classmethod
    def from_hf(cls, raw: dict, warnings: list[str] | None = None) -> GPTNeoXConfig:
        source = Fields(raw)
        vocab_size, hidden_size, n_layers, n_heads = hf_sizes(source)
        if hidden_size % n_heads:
            raise source.fail("hidden_size", f"a multiple of {n_heads} heads", hidden_size)
        n_context = source.integer("max_position_embeddings", 1, MAX_CONTEXT, 2048)
        bos_ids, _ = token_ids(source, "bos_token_id", vocab_size)
        eos_ids, notes = token_ids(source, "eos_token_id", vocab_size)
        if warnings is not None:
            warnings.extend(notes)
        return cls(
            model_type=source.text("model_type"),
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=source.integer("intermediate_size", 1, MAX_WIDTH),
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=hidden_size // n_heads,
            n_context=n_context,
            norm_eps=source.number("layer_norm_eps", 0.0, 1.0, 1e-5),
            activation=activation_name(source.text("hidden_act", "gelu")),
            gated=False,
            tied=source.flag("tie_word_embeddings", False),
            bos_id=bos_ids[0] if bos_ids else None,
            eos_ids=eos_ids,
            rope=rope_from_hf(_newer_spelling(source), hidden_size // n_heads, n_context),
            parallel=source.flag("use_parallel_residual", True),
            bias=source.flag("attention_bias", True),
        )

    @classmethod
    def from_dict(
        cls, raw: dict, *, path: object = "config", error: type[FormatError] = FormatError
    ) -> GPTNeoXConfig:
        source = Fields(raw, path, error)
        known_keys_only(cls, source)
        values = common_from_dict(source)
        rope = Fields(source.get("rope"), f"{path}: rope", error)
        values["rope"] = rope_from_dict(rope, values["head_dim"])
        values["parallel"], values["bias"] = source.flag("parallel"), source.flag("bias")
        if values["model_type"] not in cls.model_types:
            raise source.fail("model_type", " or ".join(cls.model_types), values["model_type"])
        if values["n_heads"] * values["head_dim"] != values["hidden_size"]:
            raise source.fail("head_dim", "hidden_size / n_heads", values["head_dim"])
        if values["gated"] or values["n_kv_heads"] != values["n_heads"]:
            raise source.fail("config", "an ungated FFN and a key head per head", "otherwise")
        return cls(**values)

    def roles(self) -> Roles:
        vocab = (self.vocab_size, self.hidden_size)
        head = ("embed_out.weight", "lm_head.weight")
        embedding = _names("embed_in.weight") + (head if self.tied else ())
        use = "dense" if self.tied else "embed"
        planes = [PlaneRole("embed", "rows", use, (("row", TensorRole(embedding, vocab)),))]
        vectors = []
        for i in range(self.n_layers):
            planes += self._layer_planes(i)
            vectors += self._layer_vectors(i)
        vectors += self._norm("final_norm", "final_layer_norm")
        if not self.tied:
            planes.append(PlaneRole("head", "rows", "dense", (("row", TensorRole(head, vocab)),)))
        # older checkpoints carry their causal mask and frequencies
        ignored = r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
        return Roles(tuple(planes), tuple(vectors), (ignored,))

    def _layer_planes(self, i: int) -> list[PlaneRole]:
        h, n, layer = self.hidden_size, self.intermediate_size, f"layers.{i}"
        qkv = _tensor(f"{layer}.attention.query_key_value.weight", 3 * h, h)
        up = _tensor(f"{layer}.mlp.dense_h_to_4h.weight", n, h)
        down = ("down", _tensor(f"{layer}.mlp.dense_4h_to_h.weight", h, n, transposed=True))
        o = _tensor(f"{layer}.attention.dense.weight", h, h)
        planes = [
            PlaneRole(f"{layer}.qkv", "rows", "dense", (("row", qkv),)),
            PlaneRole(f"{layer}.o", "rows", "dense", (("row", o),)),
        ]
        if not self.sparse:
            return [*planes, PlaneRole(f"{layer}.ffn", "bundles", "dense", (("up", up), down))]
        deciding = PlaneRole(f"{layer}.deciding", "rows", "deciding", (("row", up),))
        return [*planes, deciding, PlaneRole(f"{layer}.ffn", "bundles", "sparse", (down,))]

    def _layer_vectors(self, i: int) -> list[VectorRole]:
        h, n, layer = self.hidden_size, self.intermediate_size, f"layers.{i}"
        first = "deciding" if self.sparse else "up"
        biases = {first: (f"{layer}.mlp.dense_h_to_4h.bias", n),
                  "ffn": (f"{layer}.mlp.dense_4h_to_h.bias", h)}  # fmt: skip
        if self.bias:
            biases["qkv"] = (f"{layer}.attention.query_key_value.bias", 3 * h)
            biases["o"] = (f"{layer}.attention.dense.bias", h)
        return [
            *self._norm(f"{layer}.attn_norm", f"{layer}.input_layernorm"),
            *self._norm(f"{layer}.ffn_norm", f"{layer}.post_attention_layernorm"),
            *(
                VectorRole(f"{layer}.{ours}.bias", (_tensor(name, length),))
                for ours, (name, length) in biases.items()
            ),
        ]

    def _norm(self, ours: str, theirs: str) -> list[VectorRole]:
        return [
            VectorRole(f"{ours}.{part}", (_tensor(f"{theirs}.{part}", self.hidden_size),))
            for part in ("weight", "bias")
        ]


def _newer_spelling(source: Fields) -> Fields:
    """Rotary keys as `rope_from_hf` knows them; a quarter of each head turns by default."""
    older = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    raw = {"partial_rotary_factor": 0.25, **source.raw}
    raw |= {new: source.raw[old] for old, new in older.items() if source.get(old) is not None}
    return Fields(raw, source.path, source.error)


def _names(name: str) -> tuple[str, ...]:
    return (f"gpt_neox.{name}", name)


def _tensor(name: str, *shape: int, transposed: bool = False) -> TensorRole:
    return TensorRole(_names(name), shape, transposed)
