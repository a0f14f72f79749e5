"""Every predictor keeps the contract of predictors/base.py."""

from __future__ import annotations

import numpy as np
import pytest

from flashllm.errors import UsageError
from flashllm.predictors import PREDICTORS

N, HIDDEN = 37, 16


def truth(x: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.resize(x, N) > 0.5).astype(np.int32)


MAKERS = {
    "window": lambda: PREDICTORS["window"](N, k=2),
    "oracle": lambda: PREDICTORS["oracle"](N, truth=truth),
    "dense": lambda: PREDICTORS["dense"](N),
}


@pytest.fixture(params=list(PREDICTORS))
def predictor(request):
    return MAKERS[request.param]()


def tokens(n=8, seed=0):
    random = np.random.default_rng(seed)
    return list(random.standard_normal((n, HIDDEN), dtype=np.float32))


def run(predictor, xs):
    predictor.reset()
    said = []
    for x in xs:
        said.append(predictor.predict(x).copy())
        predictor.observe(truth(x))
    return said


def test_ids_are_ascending_distinct_and_in_range(predictor):
    for ids in run(predictor, tokens()):
        assert ids.dtype == np.int32
        predictor.check_ids(np.ascontiguousarray(ids))


def test_the_same_sequence_gives_the_same_ids(predictor):
    first, again = run(predictor, tokens()), run(predictor, tokens())
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_predicting_changes_nothing(predictor):
    x = tokens()[0]
    predictor.observe(truth(x))
    once = predictor.predict(x).copy()
    assert (predictor.predict(x) == once).all()


def test_memory_is_stated_and_does_not_grow(predictor):
    before = predictor.resident_bytes
    run(predictor, tokens(64))
    assert predictor.resident_bytes == before >= 0


def test_a_layer_needs_bundles(predictor):
    kind = type(predictor)
    for n in (0, -1, True, 2.0):
        with pytest.raises((UsageError, TypeError)):
            kind(n)


def test_ids_that_no_predictor_may_return(predictor):
    for bad in ([3, 3], [4, 2], [-1], [N], np.array([1], np.int64)):
        with pytest.raises(UsageError):
            predictor.check_ids(np.array(bad, getattr(bad, "dtype", np.int32)))


def test_window_is_the_union_of_the_last_tokens():
    window = PREDICTORS["window"](6, k=2)
    seen = [[0, 5], [1], [2, 3], []]
    expected = [[], [0, 5], [0, 1, 5], [1, 2, 3]]
    for ids, want in zip(seen, expected, strict=True):
        assert window.predict(np.zeros(4, np.float32)).tolist() == want
        window.observe(np.array(ids, np.int32))
    window.reset()
    assert window.predict(np.zeros(4, np.float32)).size == 0
    for k in (0, True, 1.5):
        with pytest.raises(UsageError):
            PREDICTORS["window"](6, k=k)


def test_an_oracle_that_lies_is_refused():
    oracle = PREDICTORS["oracle"](4, truth=lambda x: np.array([2, 1], np.int32))
    with pytest.raises(UsageError):
        oracle.predict(np.zeros(4, np.float32))
