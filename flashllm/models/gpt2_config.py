"""The GPT-2 family's config and roles ("Language Models are Unsupervised Multitask Learners").

OPT's layers with norms before each sublayer, positions counted from row 0, and matrices that are
stored [inputs, outputs]: their items are columns, and a neuron's down piece is a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import UnsupportedError
from .base import PlaneRole, Roles, TensorRole, VectorRole, activation_name
from .fields import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, MAX_WIDTH, Fields, token_ids
from .opt_config import OPTConfig

_REFUSED = {  # option -> the only value that is computed
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


@dataclass(frozen=True, kw_only=True)
class GPT2Config(OPTConfig):
    family: ClassVar[str] = "gpt2"
    model_types: ClassVar[tuple[str, ...]] = ("gpt2",)
    position_offset: ClassVar[int] = 0

    @classmethod
    def from_hf(cls, raw: dict, warnings: list[str] | None = None) -> GPT2Config:
        source = Fields(raw)
        for key, value in _REFUSED.items():
            if source.flag(key, value) is not value:
                raise UnsupportedError(f"{source.path}: {key} {not value} is not supported")
        vocab_size = source.integer("vocab_size", 1, MAX_VOCAB, 50257)
        hidden_size = source.integer("n_embd", 1, MAX_WIDTH, 768)
        n_heads = source.integer("n_head", 1, MAX_HEADS, 12)
        if hidden_size % n_heads:
            raise source.fail("n_embd", f"a multiple of {n_heads} heads", hidden_size)
        bos_ids, _ = token_ids(source, "bos_token_id", vocab_size)
        eos_ids, notes = token_ids(source, "eos_token_id", vocab_size)
        if warnings is not None:
            warnings.extend(notes)
        return cls(
            model_type=source.text("model_type"),
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=source.integer("n_inner", 1, MAX_WIDTH, 4 * hidden_size),
            n_layers=source.integer("n_layer", 1, MAX_LAYERS, 12),
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=hidden_size // n_heads,
            n_context=source.integer("n_positions", 1, MAX_CONTEXT, 1024),
            norm_eps=source.number("layer_norm_epsilon", 0.0, 1.0, 1e-5),
            activation=activation_name(source.text("activation_function", "gelu_new")),
            gated=False,
            tied=source.flag("tie_word_embeddings", True),
            bos_id=bos_ids[0] if bos_ids else None,
            eos_ids=eos_ids,
            embed_size=hidden_size,
            norm_before=True,
            final_norm=True,
            bias=True,
            norm_affine=True,
        )

    def roles(self) -> Roles:
        h, head = self.hidden_size, ("lm_head.weight",)
        vocab = (self.vocab_size, h)
        embedding = TensorRole(_names("wte.weight") + (head if self.tied else ()), vocab)
        positions = _tensor("wpe.weight", self.n_context, h)
        planes = [
            PlaneRole("embed", "rows", "dense" if self.tied else "embed", (("row", embedding),)),
            PlaneRole("position", "rows", "embed", (("row", positions),)),
        ]
        vectors = []
        for i in range(self.n_layers):
            planes += self._layer_planes(i)
            vectors += self._layer_vectors(i)
        vectors += self._norm("final_norm", "ln_f")
        if not self.tied:
            planes.append(PlaneRole("head", "rows", "dense", (("row", TensorRole(head, vocab)),)))
        # causal masks of older checkpoints
        return Roles(tuple(planes), tuple(vectors), (r".*\.attn\.(bias|masked_bias)",))

    def _layer_planes(self, i: int) -> list[PlaneRole]:
        h, n, layer = self.hidden_size, self.intermediate_size, f"layers.{i}"
        qkv = _tensor(f"h.{i}.attn.c_attn.weight", h, 3 * h, transposed=True)
        o = _tensor(f"h.{i}.attn.c_proj.weight", h, h, transposed=True)
        up = _tensor(f"h.{i}.mlp.c_fc.weight", h, n, transposed=True)
        down = ("down", _tensor(f"h.{i}.mlp.c_proj.weight", n, h))
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
        biases = {"qkv": ("attn.c_attn", 3 * h), "o": ("attn.c_proj", h),
                  first: ("mlp.c_fc", n), "ffn": ("mlp.c_proj", h)}  # fmt: skip
        return [
            *self._norm(f"{layer}.attn_norm", f"h.{i}.ln_1"),
            *self._norm(f"{layer}.ffn_norm", f"h.{i}.ln_2"),
            *(
                VectorRole(f"{layer}.{ours}.bias", (_tensor(f"h.{i}.{theirs}.bias", length),))
                for ours, (theirs, length) in biases.items()
            ),
        ]

    def _norm(self, ours: str, theirs: str) -> list[VectorRole]:
        return [
            VectorRole(f"{ours}.{part}", (_tensor(f"{theirs}.{part}", self.hidden_size),))
            for part in ("weight", "bias")
        ]


def _names(name: str) -> tuple[str, ...]:
    return (f"transformer.{name}", name)


def _tensor(name: str, *shape: int, transposed: bool = False) -> TensorRole:
    return TensorRole(_names(name), shape, transposed)
