"""Every predictor keeps the contract of predictors/base.py."""

from __future__ import annotations

import numpy as np
import pytest

from flashllm.errors import UsageError
from flashllm.kernels import choose_kernels
from flashllm.predictors import FITTED, PREDICTORS, open_fit

from . import fits
from .kernel_planes import AVAILABLE

N, HIDDEN = fits.N, fits.HIDDEN


def truth(x: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.resize(x, N) > 0.5).astype(np.int32)


UNFITTED = {
    "window": lambda: PREDICTORS["window"](N, k=2),
    "oracle": lambda: PREDICTORS["oracle"](N, truth=truth),
    "dense": lambda: PREDICTORS["dense"](N),
}
SECTIONS = {"low_rank": fits.low_rank, "low_bit": fits.low_bit}


@pytest.fixture(params=[f"{kind}/{unit}" for kind in PREDICTORS for unit in (1, 5)
                        if unit == 1 or kind in FITTED])  # fmt: skip
def predictor(request, tmp_path):
    kind, unit = request.param.split("/")
    if kind in UNFITTED:
        return UNFITTED[kind]()
    fit = open_fit(fits.write(tmp_path / "m.fit", SECTIONS[kind](unit=int(unit))))
    return next(iter(fit.load(choose_kernels(), 0.9).values()))


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
        predictor.check_ids(ids)


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


@pytest.mark.parametrize("kind", UNFITTED)
def test_a_layer_needs_bundles(kind):
    for n in (0, -1, True, 2.0):
        with pytest.raises(UsageError):
            PREDICTORS[kind](n, **({"truth": truth} if kind == "oracle" else {}))


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


# ------------------------------------------------------------- what fitted kinds compute, exactly


def expected_scores(kind, made, x):
    """float64 scores of all bundles (-inf without a row), from the arrays that made the section."""
    if kind == "low_rank":
        _, _, a, b, bias = made
        return b @ (a @ x) + bias
    scores = np.full(N, -np.inf)
    for part in made[2]:
        bits = np.unpackbits(part.packed, axis=1, bitorder="little")
        bits = bits.reshape(len(part.ids), part.planes, -1)[:, :, : len(x)]
        codes = np.einsum("rpc,p->rc", bits.astype(float), 2.0 ** np.arange(part.planes))
        levels = 2.0 * codes - 2**part.planes + 1
        scores[part.ids] = part.scale * (levels @ x) + part.bias
    return scores


@pytest.mark.parametrize("unit", [1, 4, 5, 64])
@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("kernels", AVAILABLE)
def test_scores_above_the_threshold_are_predicted(tmp_path, kind, kernels, unit):
    made = SECTIONS[kind](unit=unit)
    fit = open_fit(fits.write(tmp_path / "m.fit", made))
    for recall, threshold in zip(fits.RECALLS, made[0].thresholds, strict=True):
        predictor = fit.load(choose_kernels(kernels), recall)[made[0].layer]
        for x in tokens(20):
            scores = expected_scores(kind, made, x)
            # int8 activations, A and B: what is nearer to the threshold than their rounding may
            # fall on either side
            room = 0.35
            sure, maybe = scores > threshold + room, scores > threshold - room
            if unit > 1:
                units = np.arange(N) // unit
                sure, maybe = (np.isin(units, units[mask]) for mask in (sure, maybe))
            said = np.zeros(N, bool)
            said[predictor.predict(x)] = True
            assert (said >= sure).all() and (said <= maybe).all()


def test_int4_columns_are_coarser_but_the_same_thing(tmp_path):
    made = fits.low_rank(weight_type="int4")
    fit = open_fit(fits.write(tmp_path / "m.fit", made))
    predictor = fit.load(choose_kernels(), 0.9)[1]
    agree = 0
    for x in tokens(20):
        said = np.zeros(N, bool)
        said[predictor.predict(x)] = True
        agree += int((said == (expected_scores("low_rank", made, x) > 0.5)).sum())
    assert agree > 0.9 * 20 * N
