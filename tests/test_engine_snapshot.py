"""A sequence's state passed out and in again: the same tokens as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest

from flashllm import LLM, Snapshot, convert
from flashllm.errors import ContextLengthError, FormatError, UsageError

from .rwkv_models import exported, official, written
from .tiny import container

PROMPT, MORE = [5, 17, 3, 42, 8], [9, 30, 11]
SETTINGS = {"ram_budget": "1GiB"}  # of this process too, which has run many tests


@pytest.fixture(scope="module", params=["llama-relu", "opt", "4", "5.2", "6", "7"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    if not request.param[0].isdigit():
        return container(folder, request.param)
    version = request.param
    source = written(folder / "m.bin", exported(official(version), version))
    convert(source, folder / "m.flash")
    return folder / "m.flash"


def greedy(llm, ids, n, **options):
    return llm.generate(ids, max_tokens=n, temperature=0.0, ignore_eos=True, **options).tokens


def test_going_on_is_as_if_it_had_all_been_said_at_once(model, tmp_path):
    with LLM(str(model), **SETTINGS) as llm:
        first = greedy(llm, PROMPT, 4)
        state = llm.save_state()
        assert state.length == len(PROMPT) + 3 and state.pending == (first[-1],)
        expected = greedy(llm, PROMPT + first + MORE, 6)
        assert greedy(llm, MORE, 6, state=state) == expected
        assert greedy(llm, MORE, 6, state=state.copy()) == expected, "a state can be used again"
        straight_on = greedy(llm, PROMPT + first, 5)
        assert greedy(llm, [], 5, state=state) == straight_on
        state.save(tmp_path / "state")
    with LLM(str(model), pin=False, prefill_chunk=2, **SETTINGS) as llm:
        loaded = Snapshot.load(tmp_path / "state")
        assert greedy(llm, MORE, 6, state=loaded) == expected
        again = llm.save_state()
        assert again.length == len(PROMPT) + 4 + len(MORE) + 5
        assert greedy(llm, PROMPT, 4) == first, "without a state, nothing is left of one"


def test_a_recurrent_state_has_one_size(tmp_path):
    convert(written(tmp_path / "m.bin", exported(official("6"), "6")), tmp_path / "m.flash")
    with LLM(str(tmp_path / "m.flash"), **SETTINGS) as llm:
        sizes = set()
        for n in (1, 50, 400):
            llm.logits([7] * n)
            sizes.add(llm.save_state().n_bytes)
        assert len(sizes) == 1


def test_a_state_of_another_model_or_too_long_is_refused(model, tmp_path):
    with LLM(str(model), **SETTINGS) as llm:
        llm.logits(PROMPT)
        state = llm.save_state()
        other = Snapshot("0" * 64, state.length, (), state.arrays)
        with pytest.raises(UsageError, match="another model"):
            llm.generate(MORE, state=other, max_tokens=1)
        longer = Snapshot(state.model, 2**39, (), state.arrays)
        with pytest.raises(ContextLengthError):
            llm.generate(MORE, state=longer, max_tokens=1)
        name = next(iter(state.arrays))
        for wrong in ({}, {**state.arrays, name: state.arrays[name][:1]}):
            misfit = Snapshot(state.model, state.length, (), wrong)
            with pytest.raises(UsageError, match="does not fit"):
                llm.generate(MORE, state=misfit, max_tokens=1)


def sealed(header: bytes, data: bytes = b"") -> bytes:
    body = b"FLSTATE1" + struct.pack("<I", len(header)) + header + data
    return body + hashlib.sha256(body).digest()


GOOD = {"model": "m", "length": 3, "pending": [1], "arrays": {"a": ["float32", 2]}}
BAD = [
    {**GOOD, "length": -1}, {**GOOD, "length": True}, {**GOOD, "length": 2**63},
    {**GOOD, "pending": 5}, {**GOOD, "pending": ["x"]}, {**GOOD, "model": 1},
    {**GOOD, "arrays": {"a": ["object", 2]}}, {**GOOD, "arrays": {"a": ["float32", -2]}},
    {**GOOD, "arrays": {"a": ["float32", 3]}}, {**GOOD, "arrays": {"a": ["float32", 2**39, 2**39]}},
    {**GOOD, "arrays": {"a": []}}, {**GOOD, "arrays": [1]}, {"model": "m"}, [], 7,
]  # fmt: skip


def test_hostile_bytes():
    data = np.array([1, 2], "<f4").tobytes()
    good = sealed(json.dumps(GOOD).encode(), data)
    found = Snapshot.from_bytes(good)
    assert found.length == 3 and found.arrays["a"].tolist() == [1, 2]
    assert found.to_bytes() == good
    for n in range(len(good)):
        with pytest.raises(FormatError):
            Snapshot.from_bytes(good[:n])
        with pytest.raises(FormatError):
            Snapshot.from_bytes(good[:n] + bytes([good[n] ^ 1]) + good[n + 1 :])
    for header in BAD:
        with pytest.raises(FormatError):
            Snapshot.from_bytes(sealed(json.dumps(header).encode(), data))
    for raw in (b"{", b"[" * 100_000, b"\xff"):
        with pytest.raises(FormatError):
            Snapshot.from_bytes(sealed(raw, data))
    long = b"FLSTATE1" + struct.pack("<I", 2**32 - 1)
    with pytest.raises(FormatError, match="header length"):
        Snapshot.from_bytes(long + hashlib.sha256(long).digest())
