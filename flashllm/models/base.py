"""What a model family tells the rest of the house about itself without touching a weight.

A family is a frozen config, normalised from the checkpoint's own keys, and a list of *roles*: which
planes and vectors the container holds and which checkpoint tensors each is made of.  Conversion
walks the roles; it knows no family.  The roles know no file: shapes here are what the config
promises, and whoever reads the checkpoint compares.

A plane holds items of equal geometry: the rows of a matrix (several matrices may be stacked), or
the bundles of one layer (a piece of every named matrix for every neuron).  The neurons of a layer's
experts are one plane of bundles, expert after expert.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

from ..errors import FormatError, UnsupportedError
from .fields import (
    MAX_CONTEXT,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    Fields,
    token_ids,
)

# Activations by their canonical names, and the spellings found in configs.
ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "relu": ("relu",),
    "relu2": ("relu2", "relu^2", "relu_2", "relu_squared", "squared_relu"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_tanh", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
}
# Where a neuron's deciding row lies: in its bundle, or in a plane beside it.  "rows": there are no
# neurons, each matrix is a plane of its own rows.
BUNDLINGS = ("all", "split", "rows")
# Exactly zero for every non-positive pre-activation: an inactive neuron need not be read.
SPARSE_ACTIVATIONS = ("relu", "relu2")


def activation_name(spelling: str) -> str:
    """The canonical name of an activation; UnsupportedError names one we do not compute."""
    for name, spellings in ACTIVATIONS.items():
        if spelling in spellings:
            return name
    known = ", ".join(s for spellings in ACTIVATIONS.values() for s in spellings)
    raise UnsupportedError(f"activation {spelling!r} is not supported; known: {known}")


@dataclass(frozen=True)
class TensorRole:
    """One checkpoint tensor: the first of `names` that exists, of exactly this `shape`.

    `transposed`: the items are the columns of the stored matrix (a down projection is stored
    [hidden, intermediate]; a neuron's piece is a column).  Which tensor it is does not depend on
    it.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = field(default=False, compare=False)

    @property
    def n_items(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def n_cols(self) -> int:
        return self.shape[0] if self.transposed else self.shape[1]


def rows_of(names: tuple[str, ...], start: int, n: int, n_rows: int) -> tuple[str, ...]:
    """Names, for a TensorRole, of rows start .. start+n-1 of a fused tensor of `n_rows` rows; every
    axis but its last counts as rows (the experts of a three-dimensional one follow each other)."""
    return tuple(f"{name}[{start}:{start + n} of {n_rows}]" for name in names)


@dataclass(frozen=True)
class PlaneRole:
    """A plane: `tensors` are (name, tensor): stacked parts of "rows", or pieces of "bundles".

    `use` says how the plane is read, which decides its frames: "embed" (single rows on demand),
    "dense" (always all of it), "deciding" (swept or pinned), "sparse" (active items only), "router"
    (all of it, float32 whatever the rest is), "experts" (all neurons of the chosen experts).
    Experts' pieces come expert by expert: (gate, up, down) of the first, then of the second, ...
    `keeps_type`: stored as the checkpoint has it even where weights are quantised.
    """

    name: str
    kind: str
    use: str
    tensors: tuple[tuple[str, TensorRole], ...]
    keeps_type: bool = False

    @property
    def n_items(self) -> int:
        return sum(tensor.n_items for group in self.groups() for _, tensor in group[:1])

    @property
    def n_each(self) -> int:
        """Items of one expert, which no frame may straddle; all items elsewhere."""
        return self.tensors[0][1].n_items if self.use == "experts" else self.n_items

    def groups(self) -> list[tuple[tuple[str, TensorRole], ...]]:
        """`tensors` cut where the items go on: every part of rows; a set of pieces of bundles."""
        n = len({name for name, _ in self.tensors}) if self.kind == "bundles" else 1
        return [self.tensors[i : i + n] for i in range(0, len(self.tensors), n)]


@dataclass(frozen=True)
class VectorRole:
    """A float32 vector: the named tensors one after another (zeros where one may be absent)."""

    name: str
    parts: tuple[TensorRole, ...]

    @property
    def length(self) -> int:
        return sum(part.shape[0] for part in self.parts)


@dataclass(frozen=True)
class Roles:
    """Everything the container holds of a checkpoint, planes in model order.

    `ignored`: regular expressions of tensor names that carry nothing (buffers and the like).
    """

    planes: tuple[PlaneRole, ...]
    vectors: tuple[VectorRole, ...]
    ignored: tuple[str, ...] = ()

    def arranged(self, bundle: str) -> Roles:
        """The same tensors with every FFN's deciding rows in a plane of their own ("split") or at
        the head of the bundles ("all"), or with every matrix of a dense FFN in a plane of its own
        rows ("rows"): what is sparse stays bundled.  Vectors keep their names."""
        if bundle == "rows":
            return replace(self, planes=tuple(r for plane in self.planes for r in _by_rows(plane)))
        planes: list[PlaneRole] = []
        for plane in self.planes:
            layer, _, last = plane.name.rpartition(".")
            held = planes[-1] if planes and planes[-1].name == f"{layer}.deciding" else None
            is_ffn = last == "ffn" and plane.kind == "bundles"
            if not is_ffn or (held is not None) == (bundle == "split"):
                planes.append(plane)
            elif bundle == "split":
                (_, first), *rest = plane.tensors
                row = (("row", first),)
                planes += [PlaneRole(f"{layer}.deciding", "rows", "deciding", row),
                           replace(plane, use="sparse", tensors=tuple(rest))]  # fmt: skip
            else:
                names = [name for name, _ in plane.tensors]
                first = ("gate" if "up" in names else "up", held.tensors[0][1])
                planes[-1] = replace(plane, tensors=(first, *plane.tensors))
        return replace(self, planes=tuple(planes))


def _by_rows(plane: PlaneRole) -> list[PlaneRole]:
    layer, _, last = plane.name.rpartition(".")
    if last != "ffn" or plane.kind != "bundles" or plane.use != "dense":
        return [plane]
    tensors = dict(plane.tensors)
    tensors["down"] = replace(tensors["down"], transposed=not tensors["down"].transposed)
    return [rows(f"{layer}.{name}", tensor) for name, tensor in tensors.items()]


def bundling(planes: Collection[str]) -> str | None:
    """How the planes of a container are arranged: "split", "all" or "rows" (Roles.arranged); None
    where no layer has an FFN of single neurons."""
    if any(name.endswith(".deciding") for name in planes):
        return "split"
    if any(name.endswith(".down") for name in planes):
        return "rows"
    return "all" if any(name.endswith(".ffn") for name in planes) else None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """What every family's config has.  Sizes are counts; `eos_ids` may be empty, `bos_id` None.

    `family` is the name a container carries, `model_types` are those of config.json it serves.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_context: int
    norm_eps: float
    activation: str
    gated: bool
    tied: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @property
    def sparse(self) -> bool:
        """True where inactive neurons contribute exactly nothing and need not be read."""
        return self.activation in SPARSE_ACTIVATIONS

    def share_read(self, plane: str) -> float:
        """How much of a plane a token asks for at most, where the config says so."""
        return 1.0

    @classmethod
    def from_hf(cls, raw: dict, warnings: list[str] | None = None) -> ModelConfig:
        """The config from a checkpoint's config.json.

        CheckpointError for what cannot be read, UnsupportedError (naming it) for what this family
        does not compute; doubtful but usable settings are appended to `warnings`.
        """
        notes: list[str] = []
        config = cls(**cls.values_from_hf(Fields(raw), notes))
        if warnings is not None:
            warnings.extend(notes)
        return config

    @classmethod
    @abstractmethod
    def values_from_hf(cls, source: Fields, notes: list[str]) -> dict[str, Any]:
        """The fields by name, out of config.json; a family that widens another adds to its."""

    @abstractmethod
    def roles(self) -> Roles:
        """The planes and vectors of a model of this config."""

    def shape_roles(self) -> Roles:
        """`roles` as far as names and sizes go; where thousands of tensors are alike, one in the
        place of them all."""
        return self.roles()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the container carries exactly this."""
        return asdict(self)

    @classmethod
    def from_dict(
        cls, raw: dict, *, path: object = "config", error: type[FormatError] = FormatError
    ) -> ModelConfig:
        """The inverse of to_dict for a dictionary from a file: unknown keys, missing keys, wrong
        types and wild numbers raise `error` with `path`."""
        source = Fields(raw, path, error)
        known = {f.name for f in fields(cls)}
        for key in sorted(map(str, source.raw.keys() - known)):
            raise source.fail(key, "a known key", "an unknown one")
        for key in sorted(known - source.raw.keys()):
            raise source.fail(key, "a value", "nothing")
        return cls(**cls.values_from_dict(source))

    @classmethod
    @abstractmethod
    def values_from_dict(cls, source: Fields) -> dict[str, Any]:
        """The fields by name, out of our own dictionary, which has all of them and no others."""


def common_from_dict(source: Fields, model_types: tuple[str, ...]) -> dict[str, Any]:
    """The fields of ModelConfig from our own dictionary, checked one by one and together."""
    vocab_size = source.integer("vocab_size", 1, MAX_VOCAB)
    values = {
        "model_type": source.text("model_type"),
        "vocab_size": vocab_size,
        "hidden_size": source.integer("hidden_size", 1, MAX_WIDTH),
        "intermediate_size": source.integer("intermediate_size", 1, MAX_WIDTH),
        "n_layers": source.integer("n_layers", 1, MAX_LAYERS),
        "n_heads": source.integer("n_heads", 1, MAX_HEADS),
        "n_kv_heads": source.integer("n_kv_heads", 1, MAX_HEADS),
        "head_dim": source.integer("head_dim", 1, 2**14),
        "n_context": source.integer("n_context", 1, MAX_CONTEXT),
        "norm_eps": source.number("norm_eps", 0.0, 1.0),
        "activation": source.text("activation"),
        "gated": source.flag("gated"),
        "tied": source.flag("tied"),
        "bos_id": source.integer("bos_id", 0, vocab_size - 1, None),
        "eos_ids": source.integers("eos_ids", 0, vocab_size - 1, 1024),
    }
    if values["activation"] not in ACTIVATIONS:
        raise source.fail("activation", " or ".join(ACTIVATIONS), values["activation"])
    if values["model_type"] not in model_types:
        raise source.fail("model_type", " or ".join(model_types), values["model_type"])
    check_heads(source, values["n_heads"], values["n_kv_heads"])
    return values


def check_plain(source: Fields, values: dict[str, Any], *, grouped: bool = False) -> None:
    """Raises unless heads share out the hidden size, each with its own key (unless `grouped`), and
    no FFN is gated."""
    if values["n_heads"] * values["head_dim"] != values["hidden_size"]:
        raise source.fail("head_dim", "hidden_size / n_heads", values["head_dim"])
    if values["gated"] or not (grouped or values["n_kv_heads"] == values["n_heads"]):
        raise source.fail("config", "an ungated FFN and a key head per head", "otherwise")


def check_heads(source: Fields, n_heads: int, n_kv_heads: int) -> None:
    if n_heads % n_kv_heads:
        raise source.fail("n_heads", f"a multiple of {n_kv_heads} key/value heads", n_heads)


def hf_sizes(source: Fields) -> tuple[int, int, int, int]:
    """vocab_size, hidden_size, n_layers, n_heads as every Hugging Face config spells them."""
    return (
        source.integer("vocab_size", 1, MAX_VOCAB),
        source.integer("hidden_size", 1, MAX_WIDTH),
        source.integer("num_hidden_layers", 1, MAX_LAYERS),
        source.integer("num_attention_heads", 1, MAX_HEADS),
    )


def hf_head_dim(source: Fields, hidden_size: int, n_heads: int, key: str = "hidden_size") -> int:
    """The dimensions of a head where all of them share out the hidden size, spelled `key`."""
    if hidden_size % n_heads:
        raise source.fail(key, f"a multiple of {n_heads} heads", hidden_size)
    return hidden_size // n_heads


def hf_ends(source: Fields, vocab_size: int, notes: list[str]) -> dict[str, Any]:
    """`bos_id` and `eos_ids`; a config need not have a beginning, and should have an end."""
    bos_ids, bos_notes = token_ids(source, "bos_token_id", vocab_size)
    eos_ids, eos_notes = token_ids(source, "eos_token_id", vocab_size)
    notes += (bos_notes if source.get("bos_token_id") is not None else []) + eos_notes
    return {"bos_id": bos_ids[0] if bos_ids else None, "eos_ids": eos_ids}


def rows(
    name: str, tensor: TensorRole, use: str = "dense", *, keeps_type: bool = False
) -> PlaneRole:
    """The plane of one matrix."""
    return PlaneRole(name, "rows", use, (("row", tensor),), keeps_type)


def ffn_planes(
    layer: str, pieces: tuple[tuple[str, TensorRole], ...], *, sparse: bool
) -> list[PlaneRole]:
    """A layer's FFN: `pieces` are (gate,) up, down; where it is sparse the first one decides."""
    if not sparse:
        return [PlaneRole(f"{layer}.ffn", "bundles", "dense", pieces)]
    (_, deciding), *others = pieces
    return [
        rows(f"{layer}.deciding", deciding, "deciding"),
        PlaneRole(f"{layer}.ffn", "bundles", "sparse", tuple(others)),
    ]


def affine_norm(ours: str, weight: TensorRole, bias: TensorRole) -> list[VectorRole]:
    """The vectors of a LayerNorm."""
    return [VectorRole(f"{ours}.weight", (weight,)), VectorRole(f"{ours}.bias", (bias,))]
