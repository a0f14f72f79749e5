"""The moe family's config and roles: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, with SiLU or ReLU.

Llama's layers in which some or all FFNs are replaced by a router and experts (arXiv 2401.04088,
2409.02060).  What differs between the model types is which layers have experts, whether a shared
expert stands beside them (under a gate of its own: one more row of the router), whether the chosen
weights are normalised, and how q and k are normed; all of it is normalised here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import UnsupportedError
from .base import PlaneRole, Roles, TensorRole, rows_of
from .fields import MAX_LAYERS, MAX_WIDTH, Fields
from .llama_config import LlamaConfig, stem

MAX_EXPERTS, MAX_EXPERTS_IN_ALL = 2**11, 2**16  # of a layer and of a model; published: 512, 31 k
_DEFAULT_EXPERTS = {
    "mixtral": (8, 2), "qwen2_moe": (60, 4), "qwen3_moe": (128, 8), "olmoe": (64, 8),
    "deepseek_v2": (64, 6),
}  # fmt: skip
# others: intermediate_size
_DEFAULT_EXPERT_SIZE = {"qwen2_moe": 1408, "qwen3_moe": 768, "deepseek_v2": 1407}


@dataclass(frozen=True, kw_only=True)
class MoEConfig(LlamaConfig):
    """`intermediate_size` is that of layers without experts; `expert_layers` are those with.

    `shared_size` is 0 without a shared expert; `shared_gated`: it stands under a gate of its own.
    """

    family: ClassVar[str] = "moe"
    model_types: ClassVar[tuple[str, ...]] = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
    shared_gated: ClassVar[bool] = True
    shared_expert: ClassVar[str] = "shared_expert"  # as the checkpoints call it

    n_experts: int
    n_chosen: int
    expert_size: int
    shared_size: int
    normalise: bool
    expert_layers: tuple[int, ...]

    @classmethod
    def values_from_hf(cls, source: Fields, notes: list[str]) -> dict[str, Any]:
        values = super().values_from_hf(source, notes)
        model_type = values["model_type"]
        if source.get("clip_qkv") is not None:
            raise UnsupportedError(f"{source.path}: clip_qkv is not supported")
        bias = source.flag("attention_bias", False) and model_type in ("qwen3_moe", "olmoe")
        n_experts, n_chosen = _DEFAULT_EXPERTS[model_type]
        key = "num_experts" if source.get("num_experts") is not None else "num_local_experts"
        moe = {
            "qkv_bias": source.flag("qkv_bias", True) if model_type == "qwen2_moe" else bias,
            "o_bias": bias,
            "qk_norm": model_type in ("qwen3_moe", "olmoe"),
            "n_experts": source.integer(key, 1, MAX_EXPERTS, n_experts),
            "n_chosen": source.integer("num_experts_per_tok", 1, MAX_EXPERTS, n_chosen),
            "expert_size": values["intermediate_size"],
            "shared_size": 0,
            "normalise": model_type == "mixtral" or source.flag("norm_topk_prob", False),
            "expert_layers": _expert_layers(source, model_type, values["n_layers"]),
        }
        if model_type in _DEFAULT_EXPERT_SIZE:
            default = _DEFAULT_EXPERT_SIZE[model_type]
            moe["expert_size"] = source.integer("moe_intermediate_size", 1, MAX_WIDTH, default)
        if model_type in ("qwen2_moe", "deepseek_v2"):
            key = "shared_expert_intermediate_size"
            moe["shared_size"] = source.integer(key, 1, MAX_WIDTH, 5632)
        return _checked(source, values | moe)

    @classmethod
    def values_from_dict(cls, source: Fields) -> dict[str, Any]:
        values = super().values_from_dict(source)
        n_layers = values["n_layers"]
        return _checked(
            source,
            values
            | {
                "n_experts": source.integer("n_experts", 1, MAX_EXPERTS),
                "n_chosen": source.integer("n_chosen", 1, MAX_EXPERTS),
                "expert_size": source.integer("expert_size", 1, MAX_WIDTH),
                "shared_size": source.integer("shared_size", 0, MAX_WIDTH),
                "normalise": source.flag("normalise"),
                "expert_layers": source.integers("expert_layers", 0, n_layers - 1, n_layers),
            },
        )

    def shape_roles(self) -> Roles:
        """One expert with the neurons of all of them, behind a router of as many rows."""
        one = replace(self, n_experts=1, expert_size=self.n_experts * self.expert_size).roles()
        router = TensorRole(("router",), (self.n_experts, self.hidden_size))
        planes = tuple(
            replace(plane, tensors=(("router", router), *plane.tensors[1:]))
            if plane.use == "router" else plane
            for plane in one.planes
        )  # fmt: skip
        return replace(one, planes=planes)

    def share_read(self, plane: str) -> float:
        routed = plane.endswith((".experts", ".neurons"))
        return self.n_chosen / self.n_experts if routed else 1.0

    @property
    def qk_norm_widths(self) -> tuple[int, int]:
        if self.model_type == "olmoe":  # over all heads at once
            return self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return super().qk_norm_widths

    def _layer_planes(self, i: int, n_q: int) -> list[PlaneRole]:
        planes = super()._layer_planes(i, n_q)
        if i not in self.expert_layers:
            return planes
        h, layer = self.hidden_size, f"layers.{i}"
        homes = (f"{layer}.mlp", f"{layer}.block_sparse_moe")
        router = [("router", _tensor([f"{home}.gate.weight" for home in homes], self.n_experts, h))]
        added = []
        if self.shared_size:
            shared = f"{layer}.mlp.{self.shared_expert}"
            if self.shared_gated:
                router.append(("shared_gate", _tensor([f"{shared}_gate.weight"], 1, h)))
            names = {piece: [f"{shared}.{piece}_proj.weight"] for piece in ("gate", "up", "down")}
            pieces = _pieces(names, self.shared_size, h)
            added = [PlaneRole(f"{layer}.shared", "bundles", "dense", pieces)]
        experts: list[tuple[str, TensorRole]] = []
        for e in range(self.n_experts):
            experts += self._expert(e, *homes)
        return [
            *(plane for plane in planes if plane.name.endswith((".qkv", ".o"))),
            PlaneRole(f"{layer}.router", "rows", "router", tuple(router)),
            *self._routed(layer, experts),
            *added,
        ]

    def _routed(self, layer: str, experts: list[tuple[str, TensorRole]]) -> list[PlaneRole]:
        """The planes of the experts: where ReLU leaves neurons out, their gates are read by expert
        and decide, and what is multiplied with them by neuron."""
        if not self.sparse:
            return [PlaneRole(f"{layer}.experts", "bundles", "experts", tuple(experts))]
        gates = tuple(piece for piece in experts if piece[0] == "gate")
        others = tuple(piece for piece in experts if piece[0] != "gate")
        return [
            PlaneRole(f"{layer}.experts", "bundles", "experts", gates),
            PlaneRole(f"{layer}.neurons", "bundles", "sparse", others),
        ]

    def _expert(self, e: int, home: str, older: str) -> tuple[tuple[str, TensorRole], ...]:
        """Pieces of expert `e`: separate tensors, or parts of all experts' tensors as a library
        keeps them in memory, gate_up [experts, 2 n, h] and down [experts, h, n]."""
        n, h = self.expert_size, self.hidden_size
        names = {
            piece: [f"{home}.experts.{e}.{piece}_proj.weight",
                    f"{older}.experts.{e}.{numbered}.weight"]
            for piece, numbered in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        }  # fmt: skip
        both, down = (f"{home}.experts.gate_up_proj",), (f"{home}.experts.down_proj",)
        n_rows = 2 * n * self.n_experts
        names["gate"] += rows_of(both, 2 * n * e, n, n_rows)
        names["up"] += rows_of(both, 2 * n * e + n, n, n_rows)
        names["down"] += rows_of(down, h * e, h, h * self.n_experts)
        return _pieces(names, n, h)


def _tensor(names: Iterable[str], *shape: int, transposed: bool = False) -> TensorRole:
    return TensorRole(tuple(s for name in names for s in stem(name)), shape, transposed)


def _pieces(names: dict[str, list[str]], n: int, h: int) -> tuple[tuple[str, TensorRole], ...]:
    """Gate, up and down of one FFN of `n` neurons."""
    return (
        ("gate", _tensor(names["gate"], n, h)),
        ("up", _tensor(names["up"], n, h)),
        ("down", _tensor(names["down"], h, n, transposed=True)),
    )


def _expert_layers(source: Fields, model_type: str, n_layers: int) -> tuple[int, ...]:
    if model_type in ("mixtral", "olmoe"):
        return tuple(range(n_layers))
    step = source.integer("decoder_sparse_step", 1, MAX_LAYERS, 1)
    plain: tuple[int, ...] = ()
    if source.get("mlp_only_layers") is not None:
        plain = source.integers("mlp_only_layers", 0, MAX_LAYERS, MAX_LAYERS)
    return tuple(i for i in range(n_layers) if (i + 1) % step == 0 and i not in plain)


def _checked(source: Fields, values: dict[str, Any]) -> dict[str, Any]:
    """`values` whose numbers also fit one another."""
    if values["n_chosen"] > values["n_experts"]:
        raise source.fail("experts per token", f"at most {values['n_experts']}", values["n_chosen"])
    in_all = len(values["expert_layers"]) * values["n_experts"]
    if in_all > MAX_EXPERTS_IN_ALL:
        raise source.fail("experts in all", f"at most {MAX_EXPERTS_IN_ALL}", in_all)
    if not values["gated"] or values["mlp_bias"]:
        raise source.fail("experts", "gated and without bias", "otherwise")
    return values
