"""The RWKV family's config and tensor roles: versions 4, 5.1, 5.2, 6 and 7.

A recurrent model: a time-mix (attention's place) whose state has constant size, and a channel-mix
value(relu(key(x))^2), times sigmoid(receptance(x)) up to version 6.  The channel-mix is sparse as
any squared-ReLU FFN is: its key is the deciding plane, columns of its value are the bundles.

Names and values are those of rwkv.cpp files (decays already transformed, low-rank matrices stored
by output row); readers of other layouts bring theirs to this form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import (
    ModelConfig,
    PlaneRole,
    Roles,
    TensorRole,
    VectorRole,
    affine_norm,
    common_from_dict,
    ffn_planes,
    hf_sizes,
    rows,
)
from .fields import MAX_CONTEXT, MAX_WIDTH, Fields

VERSIONS = ("4", "5.1", "5.2", "6", "7")
# Ranks of the low-rank matrices: of v6's token-dependent mixing, and of what v6 and v7 compute by
# them: decay, learning rate ("a"), value residual ("v") and gate.
RANKS = ("mix_rank", "decay_rank", "rate_rank", "value_rank", "gate_rank")
RANKS_OF = {"6": RANKS[:2], "7": RANKS[1:]}
# Which inputs of the time-mix are mixed with the token before, in the order they are stored.
MIXED = {"4": "kvr", "5.1": "kvr", "5.2": "kvrg", "6": "wkvrg", "7": "rwkvag"}


@dataclass(frozen=True, kw_only=True)
class RWKVConfig(ModelConfig):
    """`n_context` is no limit of the architecture: the state does not grow.

    Version 4 decays channel by channel: n_heads is then hidden_size and head_dim 1.
    """

    family: ClassVar[str] = "rwkv"
    model_types: ClassVar[tuple[str, ...]] = ("rwkv",)

    version: str
    group_norm_eps: float
    mix_rank: int = 0
    decay_rank: int = 0
    rate_rank: int = 0
    value_rank: int = 0
    gate_rank: int = 0

    @property
    def has_receptance(self) -> bool:
        """True where the channel-mix is multiplied by a gate of its own."""
        return self.version != "7"

    @classmethod
    def values_from_hf(cls, source: Fields, notes: list[str]) -> dict[str, Any]:
        vocab_size, hidden_size, n_layers, n_heads = hf_sizes(source)
        version = _version(source)
        values = {
            "model_type": source.text("model_type"),
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": source.integer("intermediate_size", 1, MAX_WIDTH),
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": n_heads,
            "head_dim": max(1, hidden_size // n_heads),
            "n_context": MAX_CONTEXT,
            "norm_eps": 1e-5,  # fixed in the architecture, as is the next
            "group_norm_eps": 64e-5 if version in ("6", "7") else 1e-5,
            "activation": "relu2",
            "gated": False,
            "tied": False,
            "bos_id": None,
            # both vocabularies of published models have their end of text at 0; bytes have none
            "eos_ids": () if vocab_size == 256 else (0,),
            "version": version,
            **{name: source.integer(name, 0, MAX_WIDTH, 0) for name in RANKS},
        }
        cls(**values)._check(source)
        return values

    @classmethod
    def values_from_dict(cls, source: Fields) -> dict[str, Any]:
        values = common_from_dict(source, cls.model_types)
        values["version"] = _version(source)
        values["group_norm_eps"] = source.number("group_norm_eps", 0.0, 1.0)
        values |= {name: source.integer(name, 0, MAX_WIDTH) for name in RANKS}
        cls(**values)._check(source)
        return values

    def _check(self, source: Fields) -> None:
        if self.n_heads * self.head_dim != self.hidden_size or self.n_kv_heads != self.n_heads:
            raise source.fail("head_dim", "hidden_size / n_heads", self.head_dim)
        if self.version == "4" and self.head_dim != 1:
            raise source.fail("head_dim", "1 in version 4", self.head_dim)
        if self.activation != "relu2" or self.gated or self.tied:
            raise source.fail("config", "an ungated squared-ReLU channel-mix, untied", "otherwise")
        needed = RANKS_OF.get(self.version, ())
        for name in RANKS:
            least = int(name in needed and (name != "value_rank" or self.n_layers > 1))
            rank = getattr(self, name)
            if rank < least or (rank and name not in needed):
                raise source.fail(name, f"a rank of version {self.version}", rank)

    def roles(self) -> Roles:
        vocab = (self.vocab_size, self.hidden_size)
        planes = [rows("embed", _tensor("emb.weight", *vocab), "embed")]
        vectors = self._norm("embed_norm", "blocks.0.ln0")
        for i in range(self.n_layers):
            planes += self._time_planes(i) + self._channel_planes(i)
            vectors += self._layer_vectors(i)
        planes.append(_rows("head", "head.weight", *vocab))
        vectors += self._norm("final_norm", "ln_out")
        # present in layer 0 of some files, and used by none: there is no earlier value to mix in
        return Roles(tuple(planes), tuple(vectors), (r"blocks\.0\.att\.v[012]",))

    def _time_planes(self, i: int) -> list[PlaneRole]:
        h, ours, theirs = self.hidden_size, f"layers.{i}.", f"blocks.{i}.att."
        planes = []
        for name, key, *shape in self._low_rank(i):
            planes.append(_rows(ours + name, theirs + key, *shape, keeps_type=True))
        projections = {"r": "receptance", "k": "key", "v": "value"}
        if self.version in ("5.2", "6"):
            projections["g"] = "gate"
        for name, key in {**projections, "o": "output"}.items():
            planes.append(_rows(ours + name, f"{theirs}{key}.weight", h, h))
        return planes

    def _low_rank(self, i: int) -> list[tuple[str, str, int, int]]:
        """(plane, key, rows, columns) of the low-rank matrices in the order they are applied."""
        h = self.hidden_size
        if self.version == "6":
            found = [("mix1", "time_maa_w1", 5 * self.mix_rank, h)]
            found += [(f"mix2_{x}", f"time_maa_w2.{x}", h, self.mix_rank) for x in MIXED["6"]]
            found += [("decay1", "time_decay_w1", self.decay_rank, h)]
            return [*found, ("decay2", "time_decay_w2", h, self.decay_rank)]
        if self.version != "7":
            return []
        pairs = [("decay", "w", self.decay_rank), ("rate", "a", self.rate_rank)]
        pairs += [("value", "v", self.value_rank)] if i else []
        pairs += [("gate", "g", self.gate_rank)]
        return [
            place
            for name, key, rank in pairs
            for place in ((f"{name}1", f"{key}1", rank, h), (f"{name}2", f"{key}2", h, rank))
        ]

    def _channel_planes(self, i: int) -> list[PlaneRole]:
        h, n = self.hidden_size, self.intermediate_size
        ours, theirs = f"layers.{i}.", f"blocks.{i}.ffn."
        down = TensorRole((theirs + "value.weight",), (h, n), transposed=True)
        planes = [_rows(ours + "receptance", theirs + "receptance.weight", h, h)]
        pieces = (("up", _tensor(theirs + "key.weight", n, h)), ("down", down))
        return [
            *(planes if self.has_receptance else []),
            *ffn_planes(f"layers.{i}", pieces, sparse=True),
        ]

    def _layer_vectors(self, i: int) -> list[VectorRole]:
        h, ours, theirs = self.hidden_size, f"layers.{i}.", f"blocks.{i}."
        vectors = self._norm(ours + "att_norm", theirs + "ln1")
        vectors += self._norm(ours + "ffn_norm", theirs + "ln2")
        if self.version != "4":
            vectors += self._norm(ours + "head_norm", theirs + "att.ln_x")
        sizes = {f"att.{key}": (name, n) for name, key, n in self._time_vectors(i)}
        mix = {"6": "time_maa_", "7": "x_"}.get(self.version, "time_mix_")
        for x in "kr" if self.has_receptance else "k":
            sizes[f"ffn.{mix}{x}"] = (f"channel_mix_{x}", h)
        return vectors + [
            VectorRole(ours + name, (_tensor(theirs + key, n),))
            for key, (name, n) in sizes.items()
        ]

    def _time_vectors(self, i: int) -> list[tuple[str, str, int]]:
        """(vector, key, length) of what the time-mix has beside matrices and norms."""
        h, version = self.hidden_size, self.version
        if version == "7":
            biases = [("decay0", "w0"), ("rate0", "a0"), *([("value0", "v0")] if i else [])]
            scales = [("k_k", "k_k"), ("k_a", "k_a"), ("bonus", "r_k")]
            return [("mix", "x_rwkvag", 6 * h), *((name, key, h) for name, key in biases + scales)]
        mixes = "x" + MIXED["6"] if version == "6" else MIXED[version]
        prefix = "time_maa_" if version == "6" else "time_mix_"
        found = [(f"mix_{x}", prefix + x, h) for x in mixes]
        n_decays = self.n_heads if version == "5.1" else h
        first = "time_first" if version in ("4", "5.1") else "time_faaaa"
        return [*found, ("decay", "time_decay", n_decays), ("first", first, n_decays)]

    def _norm(self, ours: str, theirs: str) -> list[VectorRole]:
        width = self.hidden_size
        return affine_norm(
            ours, _tensor(f"{theirs}.weight", width), _tensor(f"{theirs}.bias", width)
        )


def _version(source: Fields) -> str:
    version = source.text("version")
    if version not in VERSIONS:
        raise source.fail("version", " or ".join(VERSIONS), version)
    return version


def _tensor(name: str, *shape: int) -> TensorRole:
    return TensorRole((name,), shape)


def _rows(name: str, key: str, *shape: int, keeps_type: bool = False) -> PlaneRole:
    return rows(name, _tensor(key, *shape), keeps_type=keeps_type)
