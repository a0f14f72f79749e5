"""Inflation: a small llama checkpoint blown up to any size without changing its function.

Residual channels, neurons and key/value groups are copied and permuted, and the weights between
them scaled so that every sum over copies gives what it gave before:
- embedding columns, norm weights and the rows of o and down: repeated `channels` times; the columns
  of q, k, v, gate and up: repeated and divided by it; the final norm divided by it (tying stays
  valid).  RMSNorm does not change under repeated channels.
- rows of gate and up and columns of down: repeated `neurons` times, down divided by it.
- whole key/value groups with their query heads: repeated `kv_groups` times, o divided by it.
Plain copies would compress and flatter every measurement, so copies are jittered: noise is added to
one and subtracted from the next of a pair, and the sum over copies stays.  Extra layers are exact
identities made of cancelling pairs of neurons and heads, not of zeros, which would compress too.
Embeddings are not jittered (channels must stay equal), and neither is the last of an odd number.

Copies of a neuron still fire together: clusters by co-activation look better here than on a real
large model.  Say so beside any figure, or inflate with `apart`: then the first two copies of a
neuron carry it whole, and every further two are a *decoy pair*: a neuron of their own (decoys.py),
equal rows and opposite columns, so that what they add is zero for every input.  They fire as often
as real neurons, but two by two and not all copies at once.  Either way pre-activations have no more
than the small model's hidden_size dimensions, which flatters low-rank predictors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..checkpoints import STORAGE_DTYPES, Checkpoint
from ..errors import CheckpointError, UnsupportedError, UsageError
from ..models.base import ModelConfig, TensorRole
from ..models.llama_config import LlamaConfig
from ..quant import WEIGHT_TYPES
from .decoys import Decoys
from .resolve import resolve

_INT8_DEVIATION = 73.9  # of a uniform int8
_CACHED_TENSORS = 12  # one layer's worth of the small source
_NOISE_TABLE = 1_048_573  # values; prime, so that rows start at places of their own


@dataclass(frozen=True, kw_only=True)
class Inflation:
    """How often what is copied.  `jitter`: the noise's deviation as a share of the tensor's own.

    `extra_layers` are identities and need even `neurons` and `kv_groups`.  `apart`: copies of a
    neuron do not fire together; needs even `neurons`.  `dtype` is what the matrices are rounded to:
    with "f32" the function is kept to about 1e-6, with the others to their rounding.  The same
    numbers give the same weights.
    """

    channels: int = 1
    neurons: int = 1
    kv_groups: int = 1
    extra_layers: int = 0
    apart: bool = False
    jitter: float = 0.5
    seed: int = 0
    dtype: str = "f32"

    def check(self) -> None:
        for name in ("channels", "neurons", "kv_groups"):
            if not 1 <= getattr(self, name) <= 4096:
                raise UsageError(f"inflation: {name} must be 1 to 4096, not {getattr(self, name)}")
        if self.extra_layers < 0 or not 0 <= self.jitter <= 4 or self.seed < 0:
            raise UsageError(f"inflation: a number is out of range: {self}")
        if self.extra_layers and (self.neurons % 2 or self.kv_groups % 2):
            raise UsageError("inflation: extra layers need even neurons and kv_groups")
        if self.apart and self.neurons % 2:
            raise UsageError("inflation: copies that fire apart need even neurons")
        if self.dtype not in ("f32", "f16", "bf16"):
            raise UsageError(f"inflation: dtype must be f32, f16 or bf16, not {self.dtype!r}")


@dataclass(frozen=True)
class _Layer:
    """Where a layer comes from: the source's layer, whether it must do nothing, its neurons."""

    source: int
    identity: bool
    neurons: np.ndarray  # place -> copy * n_source_neurons + source neuron


class InflatedCheckpoint(Checkpoint):
    """`source` inflated: a virtual checkpoint whose rows are computed when they are asked for.

    Memory: the matrices of one layer of the small source.  The source stays the caller's to close.
    """

    kind: ClassVar[str] = "inflated"

    def __init__(self, source: Checkpoint, inflation: Inflation):
        super().__init__(source.path)
        inflation.check()
        self._source, self.inflation = source, inflation
        self._resolved = resolve(source)
        old = self._resolved.config
        require_inflatable(source.path, old)
        self._old = old
        self._decoys = Decoys(old.intermediate_size, inflation.seed) if inflation.apart else None
        self._cache: dict[str, np.ndarray] = {}
        self._deviations: dict[str, float] = {}
        self._layers = _spread_layers(old, inflation)
        self.inflated_config = inflated_config(old, inflation)
        self.normalised = ("llama", self.inflated_config.to_dict())
        rng = np.random.default_rng([inflation.seed, 0])
        table = rng.integers(-128, 128, _NOISE_TABLE, np.int8)
        longest = inflation.channels * old.hidden_size
        longest = max(longest, inflation.kv_groups * old.n_heads * old.head_dim)
        self._table = np.resize(table, _NOISE_TABLE + longest)
        # place -> copy * hidden_size + source channel
        self._channels = rng.permutation(inflation.channels * old.hidden_size)
        self._channel_of = self._channels % old.hidden_size
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._rows: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        self._columns: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        self._bind()

    # ------------------------------------------------------------------------ names to makers

    def _bind(self) -> None:
        new_roles, old_roles = self.inflated_config.roles(), self._old.roles()
        names = self._resolved.names
        old_tensors = {
            (plane.name, part): names[tensor]
            for plane in old_roles.planes
            for part, tensor in plane.tensors
        }
        old_vectors = {
            vector.name: [names[part] for part in vector.parts] for vector in old_roles.vectors
        }
        for number, plane in enumerate(new_roles.planes):
            prefix, index, kind = _split(plane.name)
            layer = self._layers[index] if index is not None else None
            source_plane = f"{prefix}.{layer.source}.{kind}" if layer else plane.name
            for part_number, (part, tensor) in enumerate(plane.tensors):
                source_name = old_tensors[source_plane, part]
                stream = number * 8 + part_number
                self._bind_matrix(tensor, kind, part, layer, source_name, stream)
        for vector in new_roles.vectors:
            prefix, index, kind = _split(vector.name)
            layer = self._layers[index] if index is not None else None
            sources = old_vectors[f"{prefix}.{layer.source}.{kind}" if layer else vector.name]
            for part_number, (part, name) in enumerate(zip(vector.parts, sources, strict=True)):
                self._shapes[part.names[0]] = part.shape
                self._rows[part.names[0]] = self._vector(kind, part_number, layer, name)

    def _bind_matrix(
        self,
        tensor: TensorRole,
        kind: str,
        part: str,
        layer: _Layer | None,
        source_name: str,
        stream: int,
    ) -> None:
        name, old, by = tensor.names[0], self._old, self.inflation
        self._shapes[name] = tensor.shape
        if kind == "embed":
            self._rows[name] = lambda ids: np.take(
                self._source_rows(source_name, ids), self._channel_of, axis=1
            )
        elif kind == "head":
            self._rows[name] = lambda ids: self._spread(source_name, ids, ids, 1.0, stream)
        elif kind == "qkv":
            group = old.n_heads // old.n_kv_heads * old.head_dim if part == "q" else old.head_dim
            n_source = old.n_kv_heads * group  # copies follow each other, groups inside a copy
            self._rows[name] = lambda ids: self._spread(
                source_name, ids % n_source, ids, by.channels, stream
            )
        elif kind == "o":
            self._rows[name] = lambda ids: self._output_rows(source_name, ids, layer, stream)
        elif part == "down":
            self._columns[name] = lambda ids: self._down(source_name, ids, layer, stream)
        else:
            # of a plane of deciding rows, or of whole bundles: gate, or up where there is none
            decides = part == "row" or (part == "up") != old.gated
            self._rows[name] = lambda ids: self._neuron_rows(
                source_name, ids, layer, stream, decides=decides
            )

    # ----------------------------------------------------------------------------- the makers

    def _tensor(self, name: str) -> np.ndarray:
        """A whole tensor of the small source."""
        if name not in self._cache:
            if len(self._cache) >= _CACHED_TENSORS:
                del self._cache[next(iter(self._cache))]
            self._cache[name] = self._source.rows(name, 0, self._source.shape(name)[0])
        return self._cache[name]

    def _source_rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        if len(ids) and np.array_equal(ids, np.arange(ids[0], ids[0] + len(ids))):
            return self._source.rows(name, int(ids[0]), int(ids[-1]) + 1)
        return self._tensor(name)[ids]

    def _deviation(self, name: str) -> float:
        if name not in self._deviations:
            n_rows = min(1024, self._source.shape(name)[0])
            self._deviations[name] = float(self._source.rows(name, 0, n_rows).std())
        return self._deviations[name]

    def _noise(self, name: str, stream: int, ids: np.ndarray, n: int) -> np.ndarray:
        """float32 [len(ids), n]: per id its own uniform noise, in the tensor's own units."""
        scale = np.float32(self.inflation.jitter * self._deviation(name) / _INT8_DEVIATION)
        # Each id reads one table from its own place: no generator per row, and no row before it.
        places = (ids * 0x9E3779B1 + (stream + 1) * 0x85EBCA6B) % _NOISE_TABLE
        windows = np.lib.stride_tricks.sliding_window_view(self._table, n)
        noise = windows[places].astype(np.float32)
        noise += np.float32(0.5)
        noise *= scale
        return noise

    def _pairs(self, tiled: np.ndarray, name: str, ids: np.ndarray, stream: int, by: float) -> None:
        """Adds to copies [k, n_copies, n] noise that cancels between neighbouring copies."""
        half = tiled.shape[1] // 2
        if not half or not self.inflation.jitter:
            return
        noise = self._noise(name, stream, ids, half * tiled.shape[2]).reshape(len(ids), half, -1)
        noise /= np.float32(by)
        tiled[:, 0 : 2 * half : 2] += noise
        tiled[:, 1 : 2 * half : 2] -= noise

    def _spread(
        self, name: str, source_ids: np.ndarray, ids: np.ndarray, by: float, stream: int
    ) -> np.ndarray:
        return self._spread_rows(name, self._source_rows(name, source_ids), ids, by, stream)

    def _neuron_rows(
        self, name: str, ids: np.ndarray, layer: _Layer, stream: int, *, decides: bool
    ) -> np.ndarray:
        """Rows of gate or up."""
        copies, neurons = np.divmod(layer.neurons[ids], self._old.intermediate_size)
        rows = self._source_rows(name, neurons)
        if decides and self._decoys is not None:
            rows = self._decoys.rows(self._tensor(name), neurons, copies // 2, stream)
        return self._spread_rows(name, rows, ids, self.inflation.channels, stream)

    def _spread_rows(
        self, name: str, rows: np.ndarray, ids: np.ndarray, by: float, stream: int
    ) -> np.ndarray:
        """Rows over the inflated channels, divided by `by`."""
        rows = rows / np.float32(by)
        tiled = np.repeat(rows[:, None, :], self.inflation.channels, axis=1)
        self._pairs(tiled, name, ids, stream, by)
        return np.take(tiled.reshape(len(ids), -1), self._channels, axis=1)

    def _output_rows(self, name: str, ids: np.ndarray, layer: _Layer, stream: int) -> np.ndarray:
        """Rows of o over the inflated heads: copies of all groups, one copy after another."""
        by = self.inflation.kv_groups
        rows = self._tensor(name)[self._channel_of[ids]] / np.float32(by)
        tiled = np.repeat(rows[:, None, :], by, axis=1)
        self._pairs(tiled, name, ids, stream, by)
        if layer.identity:
            _cancel(tiled)
        return tiled.reshape(len(ids), -1)

    def _down(self, name: str, ids: np.ndarray, layer: _Layer, stream: int) -> np.ndarray:
        """Columns of down, [len(ids), inflated channels]."""
        n_copies, n = self.inflation.neurons, self._old.intermediate_size
        by = 2 if self.inflation.apart else n_copies  # copies that share the neuron's weight
        copy, neuron = np.divmod(layer.neurons[ids], n)
        columns = self._tensor(name)[:, neuron].T / np.float32(by)
        columns = np.tile(columns, (1, self.inflation.channels))
        cancels = np.full(len(ids), layer.identity) | (self.inflation.apart & (copy > 1))
        sign = np.where(copy % 2, np.float32(-1), np.float32(1))[:, None]
        cancels = cancels[:, None]
        if self.inflation.jitter and n_copies > 1:
            pair = neuron * n_copies + copy // 2  # both of a pair draw the same noise
            noise = self._noise(name, stream, pair, columns.shape[1]) / np.float32(by)
            if n_copies % 2:
                noise[copy == n_copies - 1] = 0  # the one without a partner
            columns += np.where(cancels, noise, sign * noise)
        columns *= np.where(cancels, sign, np.float32(1))
        return np.take(columns, self._channels, axis=1)

    def _vector(
        self, kind: str, part_number: int, layer: _Layer | None, name: str
    ) -> Callable[[np.ndarray], np.ndarray]:
        old, by = self._old, self.inflation
        if kind == "qkv.bias":
            per_head = old.n_heads // old.n_kv_heads if part_number == 0 else 1
            n = old.n_kv_heads * per_head * old.head_dim
            return lambda ids: self._tensor(name)[ids % n]
        if kind in ("q_norm.weight", "k_norm.weight"):
            return lambda ids: self._tensor(name)[ids]
        if kind in ("deciding.bias", "gate.bias", "up.bias"):
            n = old.intermediate_size
            return lambda ids: self._tensor(name)[layer.neurons[ids] % n]
        if kind in ("o.bias", "ffn.bias") and layer.identity:
            return lambda ids: np.zeros(len(ids), np.float32)
        factor = np.float32(1 / by.channels if kind == "final_norm.weight" else 1)
        return lambda ids: self._tensor(name)[self._channel_of[ids]] * factor

    # ------------------------------------------------------------------------- the contract

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        return self._source.tokenizer_files

    def names(self) -> list[str]:
        return list(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        try:
            return self._shapes[name]
        except KeyError:
            raise CheckpointError(self.path, f"tensor {name!r}", "a tensor", "nothing") from None

    def dtype(self, name: str) -> str:
        return self.inflation.dtype if len(self.shape(name)) == 2 else "f32"

    def stored_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        self.check_open()
        if name in self._columns:  # right and slow: a file's reader would ask for columns
            every = self._columns[name](np.arange(self._shapes[name][1]))
            return self._rounded(name, np.ascontiguousarray(every.T[start:stop]))
        return self._rounded(name, self._rows[name](np.arange(start, stop)))

    def columns(self, name: str, start: int, stop: int) -> np.ndarray | None:
        if name not in self._columns:
            return None
        return self._rounded(name, self._columns[name](np.arange(start, stop)))

    def _rounded(self, name: str, values: np.ndarray) -> np.ndarray:
        dtype = self.dtype(name)
        if dtype == "f32":
            return values
        return WEIGHT_TYPES[dtype].encode(values).view(STORAGE_DTYPES[dtype])

    @property
    def fingerprint(self) -> str:
        return f"{self._source.fingerprint}|{self.inflation}"

    @property
    def files(self) -> list[Path]:
        return self._source.files

    @property
    def n_bytes(self) -> int:
        return sum(
            int(np.prod(shape)) * self.itemsize(name) for name, shape in self._shapes.items()
        )


def require_inflatable(path: object, config: ModelConfig) -> None:
    if config.family != LlamaConfig.family:
        raise UnsupportedError(
            f"{path}: {config.family} models cannot be inflated, only those of llama's family: "
            f"{', '.join(LlamaConfig.model_types)} (the repository's bench/random_*.py make other "
            "families of any size, with random weights)"
        )


def inflated_config(old: LlamaConfig, inflation: Inflation) -> LlamaConfig:
    """The config of the inflated model; head_dim stays."""
    layers = _spread_sources(old.n_layers, inflation.extra_layers)
    return replace(
        old,
        hidden_size=old.hidden_size * inflation.channels,
        intermediate_size=old.intermediate_size * inflation.neurons,
        n_heads=old.n_heads * inflation.kv_groups,
        n_kv_heads=old.n_kv_heads * inflation.kv_groups,
        n_layers=len(layers),
        windows=tuple(old.windows[source] for source, _ in layers),
    )


def _spread_sources(n_layers: int, extra: int) -> list[tuple[int, bool]]:
    """(source layer, identity) of every layer: identities follow the layer that they imitate."""
    layers = []
    for i in range(n_layers):
        layers.append((i, False))
        layers += [(i, True)] * (extra * (i + 1) // n_layers - extra * i // n_layers)
    return layers


def _spread_layers(old: LlamaConfig, inflation: Inflation) -> list[_Layer]:
    return [
        _Layer(
            source,
            identity,
            np.random.default_rng([inflation.seed, 1, number]).permutation(
                inflation.neurons * old.intermediate_size
            ),
        )
        for number, (source, identity) in enumerate(
            _spread_sources(old.n_layers, inflation.extra_layers)
        )
    ]


def _cancel(tiled: np.ndarray) -> None:
    """Makes neighbouring copies [k, n_copies, n] each other's negative."""
    tiled[:, 1::2] = -tiled[:, 0::2]


def _split(name: str) -> tuple[str, int | None, str]:
    """ "layers.3.qkv.bias" -> ("layers", 3, "qkv.bias"); "embed" -> ("", None, "embed")."""
    if not name.startswith("layers."):
        return "", None, name
    prefix, index, kind = name.split(".", 2)
    return prefix, int(index), kind
