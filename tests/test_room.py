"""Memory that a sequence does not use yet keeps weights, and comes back before it is written to."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashllm import LLM
from flashllm.conversion.enlarge import inflate
from flashllm.engine import room as room_module
from flashllm.engine.room import STEP, Room
from flashllm.errors import BudgetError, FlashReadError
from flashllm.models.pages import PAGE, LendingRows, spare_bytes
from flashllm.models.scratch import Scratch
from flashllm.models.state import KVCache, LatentCache, RecurrentState
from flashllm.planning import LABELS
from flashllm.probe.process import process_memory
from flashllm.units import MIB

from .tiny import GOLDEN

IDS = [3, 17, 40, 8, 8, 22, 61, 5]
N = 160
SAMPLING = {"temperature": 2.0, "seed": 5, "ignore_eos": True}


# ------------------------------------------------------------------------------------------ pages


@given(st.integers(1, 5), st.integers(1, 5000), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_what_is_held_stays_and_what_was_lent_is_zero(n_rows, width, shares):
    rows = LendingRows(n_rows, width, np.float32)
    kept = np.zeros((n_rows, width), np.float32)
    for i, share in enumerate(shares):
        n = int(share * width)
        rows.hold(n)
        kept[:, n:] = 0
        assert (rows.array[:, :n] == kept[:, :n]).all()
        rows.array[:, :n] = kept[:, :n] = i + 1


@pytest.mark.parametrize("width", [1 << 18, (1 << 18) + 300, 1000])
def test_as_much_goes_back_as_is_said(width):
    rows = LendingRows(64, width, np.float32)
    rows.hold(width)
    for share in (0.5, 0.25, 0.0, 1.0):
        before = process_memory().rss
        held = int(share * width)
        spare = spare_bytes(64, 4 * width, 4 * held)
        rows.hold(held)
        given_back = before - process_memory().rss
        if share == 0.5:
            first = spare
            assert abs(given_back - spare) < MIB // 2
        if share == 1.0:
            assert spare == 0 and abs(given_back + spare_bytes(64, 4 * width, 0)) < MIB // 2
    assert (first > 0) == (width > 2 * PAGE // 4)


def test_nothing_is_charged_before_it_is_held():
    before = process_memory().rss
    shape = dict(n_layers=4, n_kv_heads=8, head_dim=64, n_context=16384, dtype=np.float16)
    state = KVCache(**shape, held=0)
    assert process_memory().rss - before < MIB < state.n_bytes / 64
    assert state.spare_bytes(0) == state.n_bytes and state.spare_bytes(16384) == 0
    state.hold(1024)
    assert state.spare_bytes(1024) == state.n_bytes * 15 // 16


def test_a_latent_cache_lends_once_and_a_recurrent_state_nothing():
    shape = dict(n_layers=2, n_kv_heads=1, head_dim=64, n_context=1024, dtype=np.float16)
    latent, both = LatentCache(**shape), KVCache(**shape)
    assert latent.keys is latent.values or np.shares_memory(latent.keys, latent.values)
    assert 2 * latent.spare_bytes(512) == both.spare_bytes(512) > 0
    recurrent = RecurrentState({"x": (4, 4096)}, empty={}, capacity=100)
    recurrent.arrays["x"][:] = 3
    recurrent.hold(0)
    assert recurrent.spare_bytes(0) == 0 and (recurrent.arrays["x"] == 3).all()


def test_scratch_lends_whole_pages_of_each_buffer():
    scratch = Scratch({"a": 1024, "b": 100}, 64)
    assert scratch.spare_bytes(64) == 0
    assert scratch.spare_bytes(1) == 63 * PAGE + 5 * PAGE  # b: 25600 bytes, six whole pages
    scratch.view("a", 1)[:] = 7
    scratch.hold(1)
    assert (scratch.view("a", 1) == 7).all() and not scratch.view("a", 64)[1:].any()


# ------------------------------------------------------------------------------------------- room


class Part:
    """Stands for a state and for scratch: notes what is held."""

    capacity, max_tokens = 1000, 48

    def __init__(self, log, name):
        self.log, self.name = log, name

    def hold(self, n):
        self.log.append((self.name, n))

    def spare_bytes(self, n):
        return 1000 - n


class Following:
    """The weak reference that a room has."""

    def __init__(self, log):
        self.log, self.error = log, None

    def __call__(self):
        return self._follow

    def _follow(self):
        self.log.append("weights")
        if self.error:
            raise self.error


@pytest.fixture
def lending():
    log = []
    room, follow = Room(Part(log, "state"), Part(log, "scratch")), Following(log)
    room.lend(follow)
    log.clear()
    return room, log, follow


def test_nothing_changes_until_it_lends():
    log = []
    room = Room(Part(log, "state"), Part(log, "scratch"))
    room.exactly(10, 1)
    assert not log and room.spare() == {} and room.n_positions == 1000


def test_at_first_a_chunk_is_held(lending):
    room, log, _ = lending
    assert room.spare() == {"state": 1000 - STEP, "scratch": 1000 - 48}
    room.exactly(STEP, 40)  # 64 at least, which is all there is
    assert log == []


def test_first_what_is_given_up_then_weights_then_what_is_taken(lending):
    room, log, _ = lending
    room.exactly(300, 1)
    assert log == [("state", 64), ("scratch", 1), "weights", ("state", 320), ("scratch", 1)]
    log.clear()
    room.decoding(320, 1)
    room.decoding(10, 1)  # positions that are held stay so
    assert log == []
    room.decoding(321, 3)
    assert log == [("state", 320), ("scratch", 1), "weights", ("state", 384), ("scratch", 4)]
    log.clear()
    room.at_least(1, 1)
    assert log == []
    room.exactly(1000, 48)
    assert log[-2:] == [("state", 1000), ("scratch", 48)]
    assert room.spare() == {"state": 0, "scratch": 1000 - 48}


def test_a_change_that_failed_is_done_again(lending):
    room, log, follow = lending
    follow.error = FlashReadError("m", 0, 0, "no such disk")
    with pytest.raises(FlashReadError):
        room.exactly(300, 1)
    assert log[-1] == "weights" and room.n_positions == 320
    follow.error = None
    log.clear()
    room.decoding(100, 1)  # of 64 that are held
    assert log == [("state", 64), ("scratch", 1), "weights", ("state", 128), ("scratch", 1)]


# ----------------------------------------------------------------------------------- whole engines


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of a context so long that a part of it is whole pages."""
    folder = tmp_path_factory.mktemp("room")
    shutil.copytree(GOLDEN / "llama-relu", folder / "long")
    config = json.loads((folder / "long" / "config.json").read_text())
    config["max_position_embeddings"] = 1024
    (folder / "long" / "config.json").write_text(json.dumps(config))
    inflate(folder / "long", folder / "m.flash", size_bytes=24 * MIB, quant="int8")
    return str(folder / "m.flash")


@pytest.fixture
def fine(monkeypatch):
    monkeypatch.setattr(room_module, "STEP", 4)


def kept(plan) -> int:
    return sum(plan.ledger.lines().get(label, 0) for label in LABELS.values())


def tight(model, **settings) -> LLM:
    """An engine that streams, whatever this process weighs."""
    with LLM(model, **settings) as llm:
        lines = llm.plan.ledger.lines()
    rest = sum(lines.values()) - lines["unused"] - kept(llm.plan)
    return LLM(model, ram_budget=rest + kept(llm.plan) // 2 + 4 * MIB, debug=True, **settings)


def test_a_decoding_sequence_keeps_more_weights(model, fine):
    plans = []
    with LLM(model) as llm:
        want = llm.generate(IDS, max_tokens=N, **SAMPLING).tokens
    with tight(model) as llm:
        opened = llm._opened_plan
        assert opened.streamed_bytes > 0 and opened.lends
        got = []
        for delta in llm.stream(IDS, max_tokens=N, **SAMPLING):
            got += delta.tokens
            llm.plan.ledger.check()
            plans.append(llm.plan)
        assert got == want
        assert kept(plans[1]) > kept(opened) + MIB // 2
        state = [plan.ledger["state"] for plan in plans]
        assert state == sorted(state) and len(set(state)) > 2
        assert plans[1].ledger["scratch"] < opened.ledger["scratch"] / 4
        # the next one begins anew, and has the same tokens
        again = llm.generate(IDS, max_tokens=N, **SAMPLING)
        assert again.tokens == want
        assert llm.generate(IDS, max_tokens=1, **SAMPLING).tokens == want[:1]
        assert llm.plan.ledger["state"] < state[-1]


def test_states_lists_and_drafts_find_room(model, fine):
    prompts = [IDS, IDS[:3], IDS * 4]
    with LLM(model) as llm:
        want = [llm.generate(p, max_tokens=12, **SAMPLING).tokens for p in prompts]
        saved = llm.save_state()
        on = llm.generate([7], state=saved, max_tokens=5, **SAMPLING).tokens
    with tight(model, speculate=3) as llm:
        assert [r.tokens for r in llm.generate(prompts, max_tokens=12, **SAMPLING)] == want
        assert llm.generate(IDS, max_tokens=12, **SAMPLING).tokens == want[0]
        assert llm.generate([7], state=saved, max_tokens=5, **SAMPLING).tokens == on
        assert llm.logits(IDS * 5).shape == (40, llm.vocab_size)


def test_a_resize_counts_what_is_lent_and_keeps_to_the_floor_of_all_of_it(model, fine):
    with tight(model) as llm:
        opened, budget = llm._opened_plan, llm.ram_budget
        want = llm.generate(IDS, max_tokens=30, **SAMPLING).tokens
        before = llm.plan
        llm.resize(budget - MIB)
        assert kept(llm.plan) < kept(before)
        assert llm.plan.ledger["state"] == before.ledger["state"] < opened.ledger["state"]
        assert llm.generate(IDS, max_tokens=30, **SAMPLING).tokens == want
        llm.resize(budget)
        assert llm.plan.resident == before.resident


def test_nothing_is_lent_where_everything_is_kept(model):
    with LLM(model) as llm:
        llm.generate(IDS, max_tokens=3, **SAMPLING)
        assert not llm.plan.lends and llm._engine.room.spare() == {}
        assert llm.plan == dataclasses.replace(llm._opened_plan)


def test_what_the_caller_borrows_is_a_line_of_the_plan_and_comes_back(model):
    with tight(model) as llm:
        want = llm.generate(IDS, max_tokens=8, **SAMPLING).tokens
        before = llm.plan
        with llm.lend(3 * MIB):
            assert llm.plan.ledger["lent to the caller"] >= 3 * MIB
            assert kept(llm.plan) < kept(before) - 2 * MIB
            assert llm.generate(IDS, max_tokens=8, **SAMPLING).tokens == want
        assert llm.plan.resident == before.resident
        with pytest.raises(BudgetError), llm.lend(2**30):
            raise AssertionError("lent a GiB")
        assert llm.plan.resident == before.resident
        assert llm.plan.ledger.lines() == before.ledger.lines()
