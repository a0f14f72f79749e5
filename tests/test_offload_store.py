"""Every lease shows the truth, ascending, each item once: any residency, codec, mode, history."""

from __future__ import annotations

import time

import numpy as np
import pytest

from flashllm.errors import ClosedError, UnknownNameError, UsageError
from flashllm.offload import WeightStore, slot_bytes_of, store_bytes, store_costs
from flashllm.offload.planner import Pace
from flashllm.probe.curve import DEFAULT_CURVE
from flashllm.storage.wrappers import SlowStorage
from flashllm.units import MIB

from .offload_model import (
    ORDER,
    SPARSE,
    AffineCurve,
    Model,
    active,
    item_bytes,
    read_ids,
    read_rows,
    read_scan,
    run_step,
)

CODECS = ("raw", "zstd", "planes")
SHARES = (0.0, 0.1, 0.5, 0.97, 1.0)


@pytest.fixture(params=CODECS)
def model(request, tmp_path):
    model = Model(tmp_path / "m.flash", request.param)
    yield model
    model.close()


@pytest.fixture
def raw_model(tmp_path):
    model = Model(tmp_path / "m.flash")
    yield model
    model.close()


@pytest.mark.parametrize("mode", ["sweep", "cached", "adaptive"])
@pytest.mark.parametrize("share", SHARES)
def test_steps_show_the_truth(model, share, mode):
    store = model.store(model.share(share), mode=mode)
    rng = np.random.default_rng(5)
    for step in range(12):
        density = (0.02, 0.3, 0.9)[step % 3]
        stats = run_step(model, store, rng, density=density, admit=step not in (0, 6))
        assert stats.steps == 1 and stats.bytes_useful <= stats.bytes_read + stats.hits * 1e9
        if share == 1.0:
            assert stats.bytes_read == 0 and stats.misses == 0 and stats.wait_ns == 0
    sums = store.statistics()
    assert sums.steps == 12 and (sums.bytes_read > 0)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_one_stage_and_many(model, share):
    for ring_stages in (1, 2, 50):
        store = model.store(model.share(share), ring_stages=ring_stages)
        rng = np.random.default_rng(1)
        for _ in range(3):
            run_step(model, store, rng)
        store.close()


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_ids_and_all_ids(model, density):
    for mode in ("sweep", "cached"):
        store = model.store(model.share(0.3), mode=mode)
        rng = np.random.default_rng(1)
        for _ in range(3):
            run_step(model, store, rng, density=density)
        store.close()


def test_resident_part_comes_first(raw_model):
    store = raw_model.store({"layers.0.qkv": 10})
    store.begin_step(ORDER, admit=True)
    lease = next(store.scan("layers.0.qkv"))
    assert (lease.start, lease.stop) == (0, 100)
    store.end_step()


def test_bytes_are_counted(raw_model):
    """A sweep reads exactly the absent frames, once; nothing is read twice across steps."""
    store = raw_model.store({"layers.0.qkv": 10, "layers.0.ffn": 40}, mode="sweep", ring_stages=50)
    planes = raw_model.container.planes
    lengths = {name: -(-p.stored.astype(int) // 512) * 512 for name, p in planes.items()}
    loaded = store.statistics().bytes_read
    assert loaded == lengths["layers.0.qkv"][:10].sum() + lengths["layers.0.ffn"].sum()
    order = ("layers.0.qkv", "layers.0.ffn", "layers.2.ffn")
    per_step = lengths["layers.0.qkv"][10:].sum() + lengths["layers.2.ffn"].sum()
    total = 0
    for step in range(4):
        store.begin_step(order, admit=True, next_order=order if step < 3 else None)
        for name in order:
            read_scan(raw_model, store, name)
        stats = store.end_step()
        total += stats.bytes_read
        assert stats.bytes_dropped == 0 and stats.bytes_useful == per_step
    assert total == 4 * per_step


def test_reads_ahead_across_steps(raw_model):
    """With a ring larger than a step, the next step's bytes are read during this one."""
    store = raw_model.store(ring_stages=80)
    order = ("layers.0.qkv",)
    store.begin_step(order, admit=True, next_order=order)
    n_bytes = sum(-(-int(n) // 512) * 512 for n in raw_model.container.planes[order[0]].stored)
    assert store.statistics().bytes_read == 2 * n_bytes
    read_scan(raw_model, store, order[0])
    store.end_step()
    store.begin_step(order, admit=True)
    read_scan(raw_model, store, order[0])
    assert store.end_step().bytes_read == 0


def test_leaving_the_program_costs_bytes_not_truth(model):
    store = model.store(model.share(0.2))
    rng = np.random.default_rng(3)
    names = [name for name in ORDER if name not in SPARSE]
    for _ in range(10):
        announced = tuple(rng.permutation(ORDER))
        store.begin_step(announced, admit=True, next_order=tuple(rng.permutation(ORDER)))
        for name in rng.permutation(names)[:3]:
            read_scan(model, store, name)
            store.check()
        store.end_step()
    assert store.statistics().bytes_dropped > 0


@pytest.mark.parametrize("mode", ["sweep", "cached"])
def test_dropped_iterators(model, mode):
    """Leases dropped half-way leave nothing pinned; the next request is right."""
    store = model.store(model.share(0.3), mode=mode)
    rng = np.random.default_rng(8)
    for n_taken in range(6):
        store.begin_step(ORDER, admit=True, next_order=ORDER)
        for name in ORDER:
            ids = active(rng, len(model.truth[name]), 0.5)
            leases = store.acquire(name, ids) if name in SPARSE else store.scan(name)
            for _ in zip(range(n_taken), leases, strict=False):
                pass
            if n_taken % 2:
                leases.close()
                store.check()
            # else: still referenced when the next one is asked for
        held = leases
        store.end_step()
        assert list(held) == []
    run_step(model, store, rng)


def test_cached_mode_reads_only_misses(raw_model):
    store = raw_model.store({"layers.1.ffn": 45}, mode="cached")
    ids = np.arange(0, 90, 2, dtype=np.int32)  # 45 single-bundle frames: just fits
    misses = []
    for _ in range(3):
        store.begin_step(("layers.1.ffn",), admit=True)
        read_ids(raw_model, store, "layers.1.ffn", ids)
        stats = store.end_step()
        misses.append(stats.misses)
        assert stats.hits + stats.misses == 45 and stats.planes_picked == 1
    assert misses[0] == 22 and misses[1:] == [0, 0]


def test_units_in_memory_come_first(model):
    """Six items a unit; of four units two are in memory, and half of one: they are handed out
    before anything is waited for, and every unit's items ascend."""
    name = "layers.0.ffn"
    plane, truth = model.container.planes[name], model.truth[name]
    store = model.store({name: 12}, mode="cached")
    before = np.r_[0:6, 36:42, 48:51].astype(np.int32)  # in frames of three items
    store.begin_step((name,), admit=True)
    read_ids(model, store, name, before)
    store.end_step()
    store.begin_step((name,), admit=True)
    started, seen, waited = store.statistics(), [], []
    for lease in store.acquire(name, np.r_[0:6, 36:42, 48:54, 60:72].astype(np.int32), unit=6):
        done = store.statistics()
        waited.append(done.wait_ns - started.wait_ns)
        assert done.reads > started.reads  # under way already
        for item in lease.ids.tolist():
            assert item_bytes(plane, lease.addresses, item) == truth[item].tobytes(), item
        seen.append(lease.ids)
    store.end_step()
    assert seen[0].tolist() == before.tolist() and waited[0] == 0
    assert np.concatenate(seen[1:]).tolist() == [*range(51, 54), *range(60, 72)]


@pytest.mark.parametrize("mode", ["sweep", "cached"])
def test_audits_leave_nothing_behind(model, mode, monkeypatch):
    """The truth is shown, its bytes are counted apart, and the steps after it are as without."""
    monkeypatch.setattr(Pace, "note", lambda self, **_: None)  # gaps would depend on the clock
    seen = []
    for audit in (False, True):
        store, rng, audited = model.store(model.share(0.4), mode=mode), np.random.default_rng(4), 0
        for _ in range(6):
            store.begin_step(SPARSE, admit=True)
            for name in SPARSE:
                n_items = model.container.planes[name].n_items
                read_ids(model, store, name, active(rng, n_items, 0.2))
                if audit:
                    read_ids(model, store, name, np.arange(2, n_items, dtype=np.int32), audit=True)
            stats = store.end_step()
            audited += stats.audit_bytes
            slots = [store._state(name).segment.slot_frame.tolist() for name in SPARSE]
            seen.append((stats.bytes_read, stats.bytes_useful, stats.hits, stats.misses, slots))
        assert (audited > 0) == audit
        if audit:
            with pytest.raises(UsageError, match="dense"):
                store.audit("layers.0.qkv", np.arange(3, dtype=np.int32))
            store.begin_step(SPARSE, admit=True)
            dropped = store.audit(SPARSE[0], np.arange(90, dtype=np.int32))
            next(dropped)
            store.end_step()
        store.close()
    assert seen[:6] == seen[6:]


def test_set_larger_than_the_segment_keeps_its_hits(raw_model):
    """60 bundles wanted of 40 slots, again and again: plain LRU would hit none."""
    store = raw_model.store({"layers.1.ffn": 40}, mode="cached")
    ids = np.arange(30, 90, dtype=np.int32)
    for step in range(4):
        store.begin_step(("layers.1.ffn",), admit=True)
        read_ids(raw_model, store, "layers.1.ffn", ids)
        stats = store.end_step()
        if step:
            assert (stats.hits, stats.misses) == (40, 20)


def test_what_is_held_can_be_seen_beside_an_iterator(raw_model):
    store = raw_model.store({"layers.0.qkv": 15, "head": 25, "layers.1.ffn": 90}, mode="cached")
    plane, truth = raw_model.container.planes["layers.0.qkv"], raw_model.truth["layers.0.qkv"]
    store.begin_step(ORDER, admit=True)
    leases = store.acquire("layers.1.ffn", np.arange(5, dtype=np.int32))
    next(leases)
    held = store.held("layers.0.qkv")
    assert (held.start, held.stop) == (0, plane.n_items)
    assert item_bytes(plane, held.addresses, 149) == truth[149].tobytes()
    assert next(leases, None) is None  # it went on to its end, and was not closed
    for name in ("head", "layers.1.ffn", "no such plane"):  # in part, sparse
        assert store.held(name) is None
    store.end_step()


def test_prompt_steps_do_not_touch_the_cache(raw_model):
    store = raw_model.store({"layers.1.ffn": 20}, mode="cached")
    rng = np.random.default_rng(2)
    for _ in range(3):
        run_step(raw_model, store, rng, density=0.2)
    held = store._state("layers.1.ffn").segment.slot_frame.copy()
    for _ in range(3):
        stats = run_step(raw_model, store, rng, density=0.9, admit=False)
        assert stats.planes_picked == 0
    assert (store._state("layers.1.ffn").segment.slot_frame == held).all()


def test_adapts_both_ways(raw_model, monkeypatch):
    """Few active bundles: picked.  Nearly all active: swept again, around the prefix."""
    monkeypatch.setattr(Pace, "note", lambda self, **_: None)  # the curve is all that is known
    store = raw_model.store({"layers.1.ffn": 10}, curve=AffineCurve(2e-4, 1e6))
    order = ("layers.1.ffn",)
    rng = np.random.default_rng(4)
    modes = []
    for step in range(60):
        density = 0.02 if step < 30 else 0.95
        store.begin_step(order, admit=True, next_order=order)
        read_ids(raw_model, store, order[0], active(rng, 90, density))
        stats = store.end_step()
        modes.append("picked" if stats.planes_picked else "swept")
    assert modes[0] == "swept" and modes[29] == "picked" and modes[59] == "swept"
    assert sum(a != b for a, b in zip(modes, modes[1:], strict=False)) == 2
    assert sorted(store._state(order[0]).segment.slot_frame) == list(range(10))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_plane_of_which_little_is_wanted_is_picked_from_the_second_token(raw_model, layer):
    name = f"layers.{layer}.ffn"
    store = raw_model.store({name: 10}, curve=AffineCurve(2e-4, 1e6))
    for picked in (0, 1, 1):
        store.begin_step((name,), admit=True, next_order=(name,))
        read_ids(raw_model, store, name, np.array([40, 60], np.int32))
        assert store.end_step().planes_picked == picked


@pytest.mark.parametrize("stuck", [False, True])
@pytest.mark.parametrize("curve", [(1.0, 1e9), (1e-4, 1e12)])
def test_a_bad_curve_does_not_make_a_sparse_run_read_everything(
    tmp_path, monkeypatch, curve, stuck
):
    """A probe that found an operation to take a second, or a sweep no time at all: what reads were
    waited for says otherwise.  `stuck`: the same without that knowledge, which sweeps."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    def slow(storage):
        clock = {"clock": lambda: now[0], "sleep": sleep}
        return SlowStorage(storage, seconds_per_read=1e-4, bytes_per_s=2e6, **clock)

    monkeypatch.setattr(time, "perf_counter_ns", lambda: int(1e9 * now[0]))
    if stuck:
        monkeypatch.setattr(Pace, "note", lambda self, **_: None)
    model = Model(tmp_path / "m.flash", wrap=slow)
    name, rng = "layers.1.ffn", np.random.default_rng(8)
    store = model.store({name: 10}, curve=AffineCurve(*curve), begin_cached=True)
    read = []
    for _ in range(50):
        store.begin_step((name,), admit=True, next_order=(name,))
        read_ids(model, store, name, active(rng, 90, 0.05))
        stats = store.end_step()
        read.append(stats.bundles_read)
    model.close()
    assert bool(stats.planes_swept) == stuck
    # By then a sweep was tried and given up, and gaps are gaps again.
    assert (min(read[26:]) > 70) if stuck else (np.mean(read[26:]) < 10)


def test_prefetch(raw_model):
    store = raw_model.store({"layers.1.ffn": 40}, mode="cached")
    ids = np.arange(50, 70, dtype=np.int32)
    store.begin_step(("layers.1.ffn",), admit=True)
    store.prefetch("layers.1.ffn", ids)
    store.prefetch("layers.1.ffn", ids)  # nothing is absent any more
    read_ids(raw_model, store, "layers.1.ffn", ids[:10])
    stats = store.end_step()
    assert (stats.hits, stats.misses, stats.bytes_read) == (10, 0, 0)
    assert stats.prefetch_bytes == 20 * 512 and stats.prefetch_dropped == 0
    unused = 0
    for _ in range(2):  # the ten that were never used are evicted in the end, and counted
        store.begin_step(("layers.1.ffn",), admit=True)
        read_ids(raw_model, store, "layers.1.ffn", np.arange(0, 40, dtype=np.int32))
        unused += store.end_step().prefetch_unused_bytes
    assert unused == 10 * 512


def test_prefetch_against_pins(raw_model):
    """Everything acquired, then advice: no pinned slot is touched, the lease stays true."""
    store = raw_model.store({"layers.1.ffn": 30}, mode="cached")
    store.begin_step(("layers.1.ffn",), admit=True)
    ids = np.arange(30, dtype=np.int32)
    for lease in store.acquire("layers.1.ffn", ids):
        before = lease.addresses.copy()
        store.prefetch("layers.1.ffn", np.arange(40, 90, dtype=np.int32))
        assert (lease.addresses[:30] == before[:30]).all()
        store.check()
    stats = store.end_step()
    assert stats.prefetch_bytes == 0 and stats.prefetch_dropped == 50


def test_gather(model):
    for share in (0.0, 0.5, 1.0):
        store = model.store(model.share(share))
        rng = np.random.default_rng(9)
        store.begin_step(ORDER, admit=True)
        for n in (0, 1, 5, 300):
            read_rows(model, store, "embed", rng.integers(0, 101, size=n).astype(np.int32))
        with pytest.raises(UsageError, match="items 0 to 100"):
            store.gather("embed", np.array([101]), np.zeros((1, 96), np.uint8))
        store.close()


def test_misuse(raw_model):
    store = raw_model.store()
    with pytest.raises(UnknownNameError, match="layers.9.ffn"):
        store.scan("layers.9.ffn")
    with pytest.raises(UnknownNameError, match="layers.9.ffn"):
        WeightStore(raw_model.container, raw_model.storage, resident={"layers.9.ffn": 1},
                    curve=DEFAULT_CURVE, ring_stages=1, stage_bytes=4096)  # fmt: skip
    for options, error in (
        ({"policy": "clock"}, UnknownNameError),
        ({"policy": "belady"}, UsageError),
        ({"mode": "lazy"}, UnknownNameError),
    ):
        with pytest.raises(error):
            raw_model.store(**options)
    with pytest.raises(UsageError, match="dense"):
        store.acquire("layers.2.ffn", np.zeros(1, np.int32))
    for bad in ([3, 2], [1, 1], [-1], [90]):
        with pytest.raises(UsageError, match="ascend within 0 to 89"):
            store.acquire("layers.1.ffn", np.array(bad, dtype=np.int32))
    store.close()
    store.close()
    for call in (lambda: store.begin_step(ORDER, admit=True), lambda: store.scan("head"),
                 lambda: store.load(), store.check):  # fmt: skip
        with pytest.raises(ClosedError):
            call()


def test_closing_with_a_lease_out(model):
    store = model.store(model.share(0.2))
    store.begin_step(ORDER, admit=True, next_order=ORDER)
    leases = store.scan("layers.0.qkv")
    addresses = next(leases).addresses
    store.close()
    assert not addresses.any() and list(leases) == []


def test_progress_of_loading(model):
    calls = []
    store = WeightStore(
        model.container, model.storage, resident=model.share(0.5), curve=DEFAULT_CURVE,
        ring_stages=16, stage_bytes=MIB,
    )  # fmt: skip
    store.load(lambda done, total, label: calls.append((done, total, label)))
    store.close()
    done = [c[0] for c in calls]
    assert done == sorted(done) and done[-1] == calls[-1][1] > 0
    assert {c[2] for c in calls} == {"weights"}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_arena_is_what_was_planned(model, share):
    options = {"ring_stages": 5, "stage_bytes": 4096, "demand_bytes": 8192}
    resident = model.share(share)
    lines = store_bytes(
        model.container, resident=resident, sparse=SPARSE, policy="lru", decode_threads=2,
        **options,
    )  # fmt: skip
    store = model.store(resident, **options)
    planned = ("resident planes", "bundle slots", "stream ring", "demand area")
    assert sum(lines[name] for name in planned) == store._arena.n_bytes
    # The plan that comes before residency is known never counts less.
    costs = store_costs(model.container, stage_bytes=4096, demand_bytes=8192)
    each = slot_bytes_of(model.container)
    slots = sum(n * each[name] for name, n in resident.items())
    assert sum(costs.fixed.values()) + 5 * costs.stage + slots >= sum(lines.values())


@pytest.mark.parametrize("policy", ["window", "lru", "lfu"])
def test_every_policy_serves(raw_model, policy):
    store = raw_model.store(raw_model.share(0.3), mode="cached", policy=policy)
    rng = np.random.default_rng(6)
    hits = sum(run_step(raw_model, store, rng, density=0.2).hits for _ in range(15))
    assert hits > 0
