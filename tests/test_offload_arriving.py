"""Requests whose parts are taken natively: as `acquire`, to the same tables."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from flashllm._core import Bring, ReadFailure, Request

from flashllm.conversion.relayout import relayout
from flashllm.errors import ChecksumError, ClosedError, FlashReadError
from flashllm.kernels.native import NativeSet
from flashllm.offload.arriving import Arriving
from flashllm.offload.pick import extents_of
from flashllm.offload.state import PlaneState

from . import fits, tiny
from .forced import opened
from .offload_model import Model, item_bytes

NAMES = ("layers.0.ffn", "layers.1.ffn")  # three items to a frame, and one


@pytest.fixture
def model(tmp_path):
    made = Model(tmp_path / "m.flash")
    yield made
    made.close()


def parts_of(arriving: Arriving):
    """What a kernel would see: (ids of a part, ...), each while it may be looked at."""
    start = -1
    while start < len(arriving.ids):
        start, stop = arriving.native.next()
        if stop > start:
            yield arriving.ids[start:stop]


def look(model, name: str, addresses: np.ndarray, ids: np.ndarray) -> None:
    plane, truth = model.container.planes[name], model.truth[name]
    for item in ids.tolist():
        assert item_bytes(plane, addresses, item) == truth[item].tobytes(), item


def whole_request(model, store, name: str, ids: np.ndarray) -> None:
    store.begin_step((name,), admit=True)
    with store.arriving(name, ids) as arriving:
        for part in parts_of(arriving):
            look(model, name, arriving.addresses, part)
    store.end_step()
    store.check()


def tables(store, name: str) -> dict[str, np.ndarray]:
    state = store._state(name)
    segment = state.segment
    return {
        "frame_slot": segment.frame_slot, "slot_frame": segment.slot_frame, "pins": segment.pins,
        "placed": segment.addresses != 0, "heat": state.policy.heat, "last_use": state.last_use,
        "n_used": np.array(segment.n_used),
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 0.8])  # 0: no slots
@pytest.mark.parametrize("demand_bytes", [1024, 4096, 65536])  # waves of a frame or two, or one
def test_does_what_acquire_does(model, name, share, demand_bytes, monkeypatch):
    monkeypatch.setattr(PlaneState, "due", lambda *_: False)  # measured times would set the gaps
    rng = np.random.default_rng(5)
    resident = {name: int(model.container.planes[name].n_frames * share)}
    how = {"mode": "cached", "demand_bytes": demand_bytes}
    native, slow = model.store(resident, **how), model.store(resident, **how)
    n_items, n_parts, n_leases = model.container.planes[name].n_items, 0, 0
    for step in range(40):
        wanted = rng.permutation(n_items)[: rng.integers(1, n_items)]
        ids, admit = np.sort(wanted).astype(np.int32), bool(step % 5)
        for store in (native, slow):
            store.begin_step((name,), admit=admit)
        got = []
        if (arriving := native.arriving(name, ids)) is not None:
            with arriving:
                for part in parts_of(arriving):
                    look(model, name, arriving.addresses, part)
                    got.append(part)
            n_parts += len(got)
        else:
            assert not admit  # prompts sweep
            got = [lease.ids for lease in native.acquire(name, ids)]
        leases = [lease.ids.copy() for lease in slow.acquire(name, ids)]
        n_leases += len(leases) * admit
        assert np.concatenate(got).tolist() == ids.tolist() == np.concatenate(leases).tolist()
        a, b = native.end_step(), slow.end_step()
        for key, value in a.as_dict().items():
            assert key.endswith("_ns") or value == b.as_dict()[key], key
        for key, x in tables(native, name).items():
            np.testing.assert_array_equal(x, tables(slow, name)[key], err_msg=key)
        for store in (native, slow):
            store.check()
    assert n_parts and n_leases
    if demand_bytes == 1024 and share < 0.5:
        assert n_parts > 65  # in many waves


def test_lent_frames_disappear_with_the_next_part(model):
    name = NAMES[1]
    store = model.store({name: 1}, mode="cached", demand_bytes=1024)
    ids = np.arange(0, 60, 2, dtype=np.int32)
    store.begin_step((name,), admit=True)
    with store.arriving(name, ids) as arriving:
        seen = []
        for part in parts_of(arriving):
            assert np.count_nonzero(arriving.addresses[seen]) <= 1  # in the slot
            assert arriving.addresses[part].all()
            seen += part.tolist()
    assert seen == ids.tolist() and np.count_nonzero(arriving.addresses) == 1
    store.end_step()


@pytest.mark.parametrize("how", ["dropped", "next asked for", "step ends", "closed", "interrupt"])
def test_a_request_left_in_the_middle(model, how):
    name, ids = NAMES[1], np.arange(0, 90, 3, dtype=np.int32)
    store = model.store({name: 12}, mode="cached", demand_bytes=1024)
    store.begin_step((name,), admit=True)
    arriving = store.arriving(name, ids)
    given = parts_of(arriving)
    next(given), next(given)
    if how == "dropped":
        gone = weakref.ref(arriving)
        del arriving, given
        gc.collect()
        assert gone() is None
    elif how == "next asked for":
        look(model, name, store._state(name).segment.addresses, next(store.acquire(name, ids)).ids)
    elif how == "closed":
        store.close()
        assert not arriving.addresses.any()
        with pytest.raises(ClosedError):
            store.arriving(name, ids)
        return
    elif how == "interrupt":
        with pytest.raises(KeyboardInterrupt), arriving:
            raise KeyboardInterrupt
    store.end_step()
    store.check()
    whole_request(model, store, name, ids)


@pytest.mark.parametrize("kind", ["byte", "cut"])
@pytest.mark.parametrize("slots", [0, 1, 30])
def test_what_cannot_be_read_is_named_and_nothing_stays(tmp_path, kind, slots):
    name, path = NAMES[1], tmp_path / "m.flash"
    model = Model(path)
    store = model.store({name: slots}, mode="cached", demand_bytes=1024)
    plane = model.container.planes[name]
    bad, ids = 71, np.arange(1, 90, 2, dtype=np.int32)
    whole = path.read_bytes()
    with open(path, "r+b") as file:
        if kind == "byte":
            at = int(plane.offsets[bad]) + 5
            file.seek(at)
            file.write(bytes([whole[at] ^ 1]))
        else:
            file.truncate(int(plane.offsets[bad]))
    error = ChecksumError if kind == "byte" else FlashReadError
    store.begin_step((name,), admit=True)
    where = rf"plane {name}, frame " + (rf"{bad} \(item {bad}\)" if kind == "byte" else "")
    seen = []
    with (
        pytest.raises(error, match=where),
        store.arriving(name, ids) as arriving,
    ):
        seen += (part.tolist() for part in parts_of(arriving))
    assert sum(seen, []) == [i for i in ids.tolist() if i < sum(seen, [])[-1] + 1]
    assert sum(seen, [])[-1] < bad
    store.end_step()
    store.check()
    path.write_bytes(whole)
    whole_request(model, store, name, ids)
    model.close()


def test_an_interrupted_end_is_repaired(model, monkeypatch):
    name, ids = NAMES[1], np.arange(0, 90, 3, dtype=np.int32)
    store = model.store({name: 12}, mode="cached", demand_bytes=1024)
    store.begin_step((name,), admit=True)
    arriving = store.arriving(name, ids)
    next(given := parts_of(arriving)), next(given)

    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store._picker._taker, "end_request", interrupted)
        with pytest.raises(KeyboardInterrupt):
            arriving.close()
    assert store._state(name).segment.pins.any()
    store.end_step()
    store.check()


def test_other_planes_and_steps_take_leases(model):
    store = model.store({NAMES[0]: 40}, mode="cached")
    ids = np.arange(5, dtype=np.int32)
    store.begin_step(NAMES, admit=True)
    assert store.arriving(NAMES[0], ids) is None  # in memory as a whole
    assert store.arriving(NAMES[1], ids[:0]) is None
    assert store.arriving("layers.2.ffn", ids) is None  # dense
    store.end_step()
    store.begin_step(NAMES, admit=False)
    assert store.arriving(NAMES[1], ids) is None  # swept
    store.end_step()
    lru = model.store({NAMES[1]: 40}, mode="cached", policy="lru")
    lru.begin_step(NAMES, admit=True)
    assert lru.arriving(NAMES[1], ids) is None
    lru.end_step()


def test_requests_that_do_not_fit_are_refused(model):
    name = NAMES[1]
    store = model.store({name: 12}, mode="cached")
    state = store._state(name)
    before = {key: array.copy() for key, array in tables(store, name).items()}

    def request(ids=(40, 41, 60), per_frame=1, tables=state.source.tables, used=12, slots=12):
        ids = np.array(ids, dtype=np.int32)
        return Request(
            state.tables, tables, ids, per_frame, slots, used, 1.0, 1, True, 0, 1 << 20, 4
        )

    def bring(request, room=4096, step=512):
        return Bring(model.storage._reader, request, *store._demand._halves, room, step, 0)

    n_frames = state.source.n_frames
    wrong = {
        "no items": {"ids": ()},
        "not ascending": {"ids": (41, 40)},
        "twice the same": {"ids": (41, 41)},
        "no rows": {"ids": (40, n_frames)},
        "before the first": {"ids": (-1, 40)},
        "items of no frame": {"per_frame": 0},
        "more used than there are": {"used": 13},
        "more slots than there are": {"slots": 13},
        "another plane": {"tables": store._state("embed").source.tables},
    }
    assert store._state("embed").source.n_frames != n_frames and state.segment.n_most == 12
    for what, changed in wrong.items():
        with pytest.raises(ValueError, match="ascending rows|fit each other|than there are"):
            request(**changed)
            pytest.fail(what)
    for key, array in tables(store, name).items():
        np.testing.assert_array_equal(array, before[key], err_msg=key)
    lent = request(ids=range(40, 70))  # eighteen of them have no slot
    for room in ({"step": 0}, {"room": 511}):
        with pytest.raises(ValueError, match="fit each other"):
            bring(lent, **room)
    first = bring(lent)
    first.next()
    while first.next()[0] < 30:
        pass
    with pytest.raises(ValueError, match="fit each other"):  # some of it is there now
        bring(lent)
    first.end()
    assert lent.end() and lent.end()  # once more is nothing
    assert not state.segment.pins.any() and np.count_nonzero(state.segment.addresses) == 12


def test_what_a_request_says_of_itself(model):
    """What is asked of it seldom, against the same from NumPy."""
    name = NAMES[0]  # three items to a frame
    store = model.store({name: 20}, mode="cached")
    state, clock = store._state(name), 1
    ids = np.array([1, 2, 30, 31, 66, 70, 71, 72, 100], dtype=np.int32)
    frames = np.unique(ids // 3).astype(np.int32)
    assert state.source.per_frame == 3
    taker = store._picker._taker
    request, counts = taker.request(
        state, ids, clock, admit=True, max_extent=1 << 20, max_frames=2
    )
    hits, placed = request.slots_held()
    there = frames < 20
    assert hits == frames[there].tolist()  # a slot has the number of the frame it began with
    assert state.segment.slot_frame[placed].tolist() == frames[~there].tolist()
    lengths = state.source.places(ids[ids // 3 >= 20] // 3)[1]
    assert counts == [len(lengths), int(lengths.sum()) // 3, 0]
    expected = state.source.extents(
        frames[~there], max_gap=state.max_gap, max_extent=1 << 20, max_frames=2
    )
    found = extents_of(request)
    for key in ("frames", "first", "offset", "length"):
        np.testing.assert_array_equal(getattr(found, key), getattr(expected, key), err_msg=key)
        assert getattr(found, key).dtype == getattr(expected, key).dtype
    assert len(request) == len(expected) > 1
    taker.end_request(state, request)  # nothing was read: the slots are empty again
    assert state.segment.n_used == 20 - len(placed) and not state.segment.pins.any()


def test_a_reader_that_is_closed_meanwhile(model, monkeypatch):
    """Neither the next wave can be submitted nor what was submitted be waited for."""
    monkeypatch.setattr(PlaneState, "due", lambda *_: False)
    name = NAMES[1]
    store = model.store({name: 1}, mode="cached", demand_bytes=1024)
    store._state(name).max_gap = 0  # each frame by a read of its own, four waves
    ids = np.arange(90, dtype=np.int32)
    store.begin_step((name,), admit=True)
    arriving = store.arriving(name, ids)
    next(given := parts_of(arriving)), next(given)
    model.storage._reader.close()
    with pytest.raises(ReadFailure) as found:
        list(parts_of(arriving))
    assert found.value.kind == "closed"
    arriving.close()
    store.end_step()


@pytest.mark.parametrize(
    "mode,bundle", [("approx", "all"), ("approx", "split"), ("exact", "split")]
)
@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize("variant", ["llama-relu", "llama-relu-biases", "opt"])
def test_tokens_and_counts_are_those_of_leases(
    tmp_path, monkeypatch, variant, bundle, mode, share
):
    monkeypatch.setattr(PlaneState, "due", lambda *_: False)  # as above
    path = str(tmp_path / "m.flash")
    relayout(tiny.container(tmp_path, variant, quant="int8"), path, bundle=bundle, per_frame=3)
    fits.beside(path)
    how = {"ram_budget": "1GiB", "mode": mode, "audit": 3, "debug": True, "share": share}
    how |= {"recall": 0.9} if mode == "approx" else {}
    how["store"] = {"mode": "cached", "demand_bytes": 8192}
    found, brought = [], []
    for leases in (False, True):
        with monkeypatch.context() as patch:
            begin = Arriving.__init__

            def counted(self, ids, *given, begin=begin, **more):
                brought.append(len(ids))
                begin(self, ids, *given, **more)

            patch.setattr(Arriving, "__init__", counted)
            patch.setattr(NativeSet, "adds_arriving", not leases)
            before = len(brought)
            with opened(path, patch, **how) as llm:
                result = llm.generate(
                    [3, 17, 40, 8], max_tokens=9, temperature=0, ignore_eos=True, logprobs=5
                )
            counted_bytes = {
                name: result.flash[name]
                for name in ("hits", "misses", "reads", "bytes_read", "bytes_useful",
                             "active_bundles", "read_bundles", "audit_bytes")
            }  # fmt: skip
            found.append((result.tokens, result.logprobs, counted_bytes))
            inner = variant == "llama-relu-biases"  # a bias comes between the dots
            assert (len(brought) > before) == (not leases and not inner)
    assert found[0] == found[1] and found[0][2]["misses"] > 0

