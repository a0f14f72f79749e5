"""A tiny container with every kind of plane, its truth, and readers of leases."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashllm.container import ContainerWriter, lay_out_pieces, open_container
from flashllm.offload import WeightStore
from flashllm.probe.curve import DEFAULT_CURVE

from .readers import opened

N_COLS = 48
# name -> (kind, pieces, items, items per frame)
ROW, BUNDLE = [("row", "f16", N_COLS)], [("up", "f16", N_COLS), ("down", "f16", N_COLS)]
PLANES = {
    "embed": ("rows", ROW, 101, 7),
    "layers.0.qkv": ("rows", ROW, 150, 10),
    "layers.0.deciding": ("rows", ROW, 120, 9),
    "layers.0.ffn": ("bundles", BUNDLE, 120, 3),
    "layers.1.qkv": ("rows", ROW, 1, 1),
    "layers.1.deciding": ("rows", ROW, 90, 90),
    "layers.1.ffn": ("bundles", BUNDLE, 90, 1),
    "layers.2.ffn": ("bundles", BUNDLE, 130, 8),
    "head": ("rows", ROW, 101, 4),
}
SPARSE = ("layers.0.ffn", "layers.1.ffn")
ORDER = tuple(name for name in PLANES if name != "embed")


_written: dict[str, tuple[bytes, dict[str, np.ndarray]]] = {}  # codec -> file, truth


def write_model(path, codec: str) -> dict[str, np.ndarray]:
    """Write the container; returns plane -> uint8[n_items, stride]."""
    if codec not in _written:
        truth = _convert(path, codec)
        _written[codec] = (Path(path).read_bytes(), truth)
    else:
        Path(path).write_bytes(_written[codec][0])
    return _written[codec][1]


def _convert(path, codec: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    truth = {}
    with ContainerWriter(path, family="test", config={}, alignment=512) as writer:
        for name, (kind, pieces, n_items, per_frame) in PLANES.items():
            placed = lay_out_pieces(pieces)
            assert writer.begin_plane(name, kind, placed, n_items, per_frame, codec)
            stride = sum(2 * N_COLS for _ in pieces)
            values = rng.standard_normal((n_items, stride // 2)).astype(np.float16)
            values[rng.random(n_items) < 0.6] = np.float16(rng.standard_normal())  # compressible
            truth[name] = values.view(np.uint8)
            writer.write_items(truth[name])
            writer.end_plane()
        writer.commit()
    return truth


@dataclass(frozen=True)
class AffineCurve:
    """An operation costs `op_s` plus its bytes at the sequential rate."""

    op_s: float = 40e-6
    sequential_bytes_per_s: float = 1e9

    def seconds(self, n_ops, bytes_each):
        return n_ops * (self.op_s + bytes_each / self.sequential_bytes_per_s)


class Model:
    """An open container, its storage and its truth."""

    def __init__(self, path, codec="raw", *, reader="pread", wrap=lambda storage: storage):
        self.truth = write_model(path, codec)
        self.container = open_container(path)
        self.storage = wrap(opened(reader, path, depth=4))
        self.stores: list[WeightStore] = []

    def store(self, resident=None, **options) -> WeightStore:
        options = {"curve": DEFAULT_CURVE, "stage_bytes": 4096, "ring_stages": 3,
                   "demand_bytes": 8192, "debug": True, **options}  # fmt: skip
        store = WeightStore(self.container, self.storage, resident=resident or {}, **options)
        self.stores.append(store)
        store.load()
        return store

    def share(self, share: float) -> dict[str, int]:
        """`resident` that keeps this share of every plane, rounded down."""
        return {name: int(p.n_frames * share) for name, p in self.container.planes.items()}

    def close(self) -> None:
        for store in self.stores:
            store.close()
        self.storage.close()
        self.container.close()


def item_bytes(plane, addresses: np.ndarray, item: int) -> bytes:
    """Bytes of an item through a lease's table, read from memory as a kernel would."""
    address = int(addresses[item // plane.per_frame])
    assert address, f"item {item} of {plane.name} is absent"
    return ctypes.string_at(address + item % plane.per_frame * plane.stride, plane.stride)


def read_scan(model: Model, store: WeightStore, name: str) -> int:
    """Scan a plane, compare every item with the truth; returns the number of leases."""
    plane, truth, at, n = model.container.planes[name], model.truth[name], 0, 0
    segment = store._state(name).segment
    for lease in store.scan(name):
        assert lease.start == at < lease.stop <= plane.n_items
        before = slice(0, lease.start // plane.per_frame)  # absent again, unless in slots
        assert ((lease.addresses[before] != 0) == (segment.frame_slot[before] >= 0)).all()
        for item in range(lease.start, lease.stop):
            assert item_bytes(plane, lease.addresses, item) == truth[item].tobytes(), item
        at, n = lease.stop, n + 1
    assert at == plane.n_items
    return n


def read_ids(
    model: Model, store: WeightStore, name: str, ids: np.ndarray, *, audit: bool = False
) -> int:
    """Acquire or audit items, compare each with the truth; returns the number of leases."""
    plane, truth, at, n = model.container.planes[name], model.truth[name], 0, 0
    for lease in (store.audit if audit else store.acquire)(name, ids):
        assert len(lease.ids)
        assert (ids[at : at + len(lease.ids)] == lease.ids).all()
        for item in lease.ids.tolist():
            assert item_bytes(plane, lease.addresses, item) == truth[item].tobytes(), item
        at, n = at + len(lease.ids), n + 1
    assert at == len(ids)
    return n


def active(rng: np.random.Generator, n_items: int, density: float) -> np.ndarray:
    return np.flatnonzero(rng.random(n_items) < density).astype(np.int32)


def run_step(model: Model, store: WeightStore, rng, *, density=0.3, admit=True, next_order=ORDER):
    """One step over all planes as a model makes it; every byte compared.  Returns its stats."""
    store.begin_step(ORDER, admit=admit, next_order=next_order)
    read_rows(model, store, "embed", rng.integers(0, 101, size=3).astype(np.int32))
    for name in ORDER:
        if name in SPARSE:
            read_ids(model, store, name, active(rng, model.truth[name].shape[0], density))
        else:
            read_scan(model, store, name)
    return store.end_step()


def read_rows(model: Model, store: WeightStore, name: str, ids: np.ndarray) -> None:
    out = np.zeros((len(ids), model.container.planes[name].stride), dtype=np.uint8)
    store.gather(name, ids, out)
    assert (out == model.truth[name][ids]).all()
