"""Fitting: the closed form against brute force, rounding, sharing out bits, and all of it together
on a tiny model, under a cap."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import closing

import numpy as np
import pytest

from flashllm import LLM
from flashllm.calibration import low_bit, low_rank, odds, statistics
from flashllm.calibration.factors import InputFactors
from flashllm.calibration.fitting import fit
from flashllm.calibration.measuring import measure
from flashllm.calibration.solving import KINDS, build, choose, survey
from flashllm.calibration.spool import Spool
from flashllm.calibration.statistics import LayerStatistics, roles_of
from flashllm.calibration.tasks import Aims, LayerTask, Option
from flashllm.cli.main import main
from flashllm.container import open_container
from flashllm.errors import (
    BudgetError,
    ConversionError,
    FitMismatchError,
    UnsupportedError,
    UsageError,
)
from flashllm.kernels import choose_kernels
from flashllm.predictors import open_fit
from flashllm.units import MIB

from . import capped, tiny

TEXT = ("once upon a time there was a fox. the fox was old, and it was happy! but the moon "
        "was cold, and no one came.\n") * 12  # fmt: skip


# -------------------------------------------------------------------------------- the closed form


def inputs(n=4000, hidden=12, seed=0):
    """Correlated inputs and a deciding matrix."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((hidden, hidden)) * np.geomspace(3, 0.05, hidden)
    x = random.standard_normal((n, hidden)) @ mix.T
    return x - x.mean(axis=0), random.standard_normal((30, hidden))


def closed_form(x, w, rank, *, damping=1e-9, weighted=True, parts=(0,)):
    """(A, B) from covariance and W in blocks that begin at `parts`."""

    def blocks():
        for first, stop in zip(parts, (*parts[1:], len(w)), strict=True):
            yield first, w[first:stop].astype(np.float32)

    factors = InputFactors(x.T @ x / len(x), damping=damping)
    found, _ = low_rank.directions(blocks, len(w), factors, rank, weighted=weighted)
    return low_rank.bottleneck(blocks, len(w), factors, found)


def test_a_covariance_that_rounding_spoilt_is_damped_more():
    """Few directions in a wide input, one of them large: float32 leaves negative eigenvalues."""
    random = np.random.default_rng(4)
    x = random.standard_normal((64, 3)) @ random.standard_normal((3, 300))
    covariance = (x.T @ x / 64).astype(np.float32)
    noise = random.standard_normal((300, 300)).astype(np.float32) * np.float32(2e-3)
    covariance += noise + noise.T
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(covariance + 1e-3 * np.diag(covariance).mean() * np.eye(300))
    factors = InputFactors(covariance)
    ordered = covariance[np.ix_(factors.order, factors.order)]
    off = factors.root @ factors.root.T - ordered
    assert (np.diag(off) > 0).all() and np.diag(off).max() <= 1.001 * np.diag(covariance).mean()
    assert np.isfinite(factors.inverse).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused(value):
    covariance = np.eye(9, dtype=np.float32)
    covariance[4, 4] = value
    with pytest.raises(UnsupportedError, match="finite"):
        InputFactors(covariance)
    with pytest.raises(UnsupportedError, match="positive"):
        InputFactors(-np.eye(9, dtype=np.float32))


@pytest.mark.parametrize("hidden", [5, 128, 131, 300])
def test_the_covariance_is_factored_in_place(hidden):
    random = np.random.default_rng(hidden)
    x = random.standard_normal((400, hidden)) * np.geomspace(1, 0.1, hidden)
    covariance = (x.T @ x / 400).astype(np.float32)
    factors = InputFactors(covariance, damping=1e-6)
    ordered = covariance[np.ix_(factors.order, factors.order)]
    assert (np.diff(np.diag(ordered)) <= 0).all()
    assert not np.tril(factors.root, -1).any() and not np.tril(factors.inverse, -1).any()
    assert np.allclose(factors.root @ factors.root.T, ordered, atol=1e-5)
    assert np.allclose(factors.inverse @ factors.root, np.eye(hidden), atol=2e-3)


@pytest.mark.parametrize("rank", [1, 3, 7, 12])
def test_no_matrix_of_that_rank_is_nearer(rank):
    x, w = inputs()
    y = x @ w.T
    a, b = closed_form(x, w, rank, weighted=False, parts=(0, 11))
    ours = np.square(y - x @ a.T.astype(float) @ b.T).sum()
    # Brute force: regress, then keep the best directions of what was fitted (Izenman, 1975).
    sizes = np.linalg.svd(x @ np.linalg.lstsq(x, y, rcond=None)[0], compute_uv=False)
    best = np.square(sizes[rank:]).sum()
    assert ours <= best * (1 + 1e-3) + 1e-6 * np.square(y).sum()
    assert ours >= best * (1 - 1e-3) - 1e-6 * np.square(y).sum()


def test_leading_parts_are_the_best_of_their_rank():
    x, w = inputs()
    a, b = closed_form(x, w, 8)
    few_a, few_b = closed_form(x, w, 3)
    assert np.allclose(b[:, :3] @ a[:3], few_b @ few_a, atol=1e-4)


def test_the_first_directions_are_found_without_the_rest(monkeypatch):
    monkeypatch.setattr(low_rank, "WHOLE", 100)
    random = np.random.default_rng(3)
    axes = np.linalg.qr(random.standard_normal((200, 200)))[0]
    sizes = np.concatenate([np.geomspace(10, 1, 20), np.full(180, 0.05)])
    gram = (axes * sizes) @ axes.T
    found = low_rank._leading(gram.astype(np.float32), 20)
    assert np.allclose(found.T @ found, np.eye(20), atol=1e-5)
    assert np.allclose(np.abs(np.diag(found.T @ axes[:, :20])), 1, atol=1e-2)


def test_directions_that_inputs_do_not_take_do_no_harm():
    x, w = inputs()
    x[:, 5] = x[:, 2]
    a, b = closed_form(x, w, 12, damping=1e-6)
    assert np.isfinite(a).all() and np.abs(x @ w.T - x @ a.T @ b.T).max() < 2e-2


def test_what_a_bottleneck_misses_is_what_was_said():
    x, w = inputs()
    factors = InputFactors(x.T @ x / len(x), damping=1e-9)
    found, whole = low_rank.directions(lambda: iter([(0, w)]), len(w), factors, 8)
    left = low_rank.left_over(lambda: iter([(0, w)]), whole, factors, found, [2, 8])
    a, b = low_rank.bottleneck(lambda: iter([(0, w)]), len(w), factors, found)
    for i, rank in enumerate((2, 8)):
        missed = np.square(x @ w.T - x @ a[:rank].T @ b[:, :rank].T).mean(axis=0)
        assert np.allclose(left[i], missed / np.square(x @ w.T).mean(axis=0), atol=1e-4)


# ---------------------------------------------------------------------------- rounding and bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rounding_with_feedback_beats_rounding_to_the_nearest(bits):
    x, w = inputs(hidden=40)
    w = w.astype(np.float32)
    codes, steps = low_bit.rounded(InputFactors(x.T @ x / len(x)), w, np.full(len(w), bits))
    assert codes.max() < 2**bits
    step = steps[:, None]
    nearest = np.clip(np.rint(w / step + (2**bits - 1) / 2), 0, 2**bits - 1)

    def left(c):
        """Deviation of what a copy gets wrong, its scale being chosen for it."""
        raw, y = x @ (low_bit.levels(c.astype(np.uint8), bits) * step / 2).T, x @ w.T
        slope = (raw * y).sum(axis=0) / (raw * raw).sum(axis=0)
        return np.sqrt(np.square(y - raw * slope).mean())

    assert left(codes) < 0.8 * left(nearest)


def test_rows_are_rounded_each_in_its_own_bits():
    x, w = inputs(hidden=70)
    factors, w = InputFactors(x.T @ x / len(x)), w.astype(np.float32)
    bits = np.arange(len(w)) % 5 + 1
    codes, steps = low_bit.rounded(factors, w, bits)
    for b in range(1, 6):
        alone, step = low_bit.rounded(factors, w[bits == b], bits[bits == b])
        assert (codes[bits == b] == alone).all() and (steps[bits == b] == step).all()


def neurons(n_rows=50, n_tokens=3000, seed=0):
    """What is decided; some rows hardly ever fire."""
    random = np.random.default_rng(seed)
    decided = random.standard_normal((n_tokens, n_rows)) - np.linspace(1, 3, n_rows)
    truth = odds.Truth.empty(n_tokens, n_rows)
    truth.count(0, decided.astype(np.float32))
    return truth, decided


def scored():
    """Tables of rows whose copies get better with their choice."""
    truth, decided = neurons()
    return low_bit.Tables(truth, [0.7, 0.3, 0.1]), decided > 0


@pytest.mark.parametrize("ratio", [0.6, 0.25, 0.08])
def test_what_is_foretold_comes_true(ratio):
    """A copy with that error is made and counted."""
    truth, decided = neurons(n_tokens=20_000)
    random = np.random.default_rng(1)
    # What regression leaves is uncorrelated with the copy, not with the truth.
    centred = decided - decided.mean(axis=0)
    noise = ratio * (1 - ratio**2) ** 0.5 * random.standard_normal(decided.shape)
    copy = (1 - ratio**2) * centred + noise + decided.mean(axis=0)
    missed, false = odds.foretell(truth, ratio)
    for k in (16, 24, 30, 34):
        above, active = copy / ratio > odds.GRID[k], decided > 0
        for told, seen in ((missed, ~above & active), (false, above & ~active)):
            assert told[:, k].sum() == pytest.approx(seen.sum(), rel=0.1, abs=60)
    many = odds.sums(truth, np.full(50, ratio))
    assert np.allclose(many[1], false.sum(axis=0), rtol=0.2, atol=50)


def test_the_truth_is_counted_in_bins():
    truth = odds.Truth.empty(5, 3)
    truth.count(1, np.array([[-1, 0], [-1, 0], [0, 0], [1, 0], [1, 2]], np.float32))
    assert truth.active().tolist() == [0, 2, 1] and truth.counts.sum() == 10
    assert truth.mean[1] == 0 and truth.deviation[1] == pytest.approx(0.894, abs=1e-3)


@pytest.mark.parametrize("budget", [400, 900, 2000])
def test_bits_go_where_they_save_most_and_within_the_budget(budget):
    tables, active = scored()
    sizes = np.array([0.0, 10.0, 20.0, 40.0])
    expected = active.sum(axis=0) + 0.5

    def false_alarms(chosen):
        missed = tables.missed.astype(float)
        missed[:, 0] = expected[:, None]
        rows = np.arange(len(chosen))
        misses = missed[rows, chosen].sum(axis=0)
        at = np.flatnonzero(misses <= 0.02 * expected.sum())
        return tables.false[rows, chosen].sum(axis=0)[at[-1]] if at.size else np.inf

    chosen = low_bit.choose_bits(tables, expected, sizes, budget=budget, recall=0.98, worth=0.0)
    assert sizes[chosen].sum() <= budget
    same = int(max(c for c in range(4) if sizes[c] * 50 <= budget))
    assert false_alarms(chosen) <= false_alarms(np.full(50, same))


def test_memory_that_saves_too_little_is_not_used():
    tables, active = scored()
    sizes, expected = np.array([0.0, 10.0, 20.0, 40.0]), active.sum(axis=0) + 0.5
    free, dear = (
        low_bit.choose_bits(tables, expected, sizes, budget=10**9, recall=0.98, worth=worth)
        for worth in (0.0, 30.0)
    )
    assert sizes[dear].sum() < sizes[free].sum()


def solved(cost, n_bytes):
    return Option("low_bit", 50, n_bytes, cost, 0.5, (1, "int8"))


def test_layers_share_a_budget_by_what_it_saves():
    layers = [[solved(100, 10), solved(40, 20), solved(30, 40)],
              [solved(50, 10), solved(45, 20)],
              [solved(9, 10)]]  # fmt: skip
    picked = choose(layers, 45)
    assert [one.cost for one in picked] == [40, 50, 9]
    assert [one.cost for one in choose(layers, 1000)] == [30, 45, 9]
    assert [one.cost for one in choose(layers, 30)] == [100, 50, 9]
    with pytest.raises(UsageError, match="larger share"):
        choose(layers, 29)


def test_roles_are_apart_and_every_one_is_served():
    windows = [np.zeros(10, np.int32)] * 40
    roles = roles_of(windows)
    assert roles[-6:] == [statistics.MEASURE] * 6 and statistics.MEASURE not in roles[:-6]
    assert roles.count(statistics.THRESHOLDS) == 8
    assert set(roles_of(windows[:3])) == {0, 1, 2}


def test_statistics_wait_on_disk_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("flashllm.calibration.spool.FLUSH_BYTES", 200)
    random = np.random.default_rng(0)
    x, decided = random.standard_normal((90, 7)), random.standard_normal((90, 19))
    tokens = {statistics.FITTED: 40, statistics.THRESHOLDS: 30, statistics.MEASURE: 20}
    with closing(Spool(tmp_path)) as spool:
        both = [LayerStatistics(spool, 7, 19, tokens) for _ in range(2)]
        assert list(tmp_path.iterdir()) == []
        for one, sign in zip(both, (1, -1), strict=True):
            at = 0
            for role, n in tokens.items():
                for first in range(at, at + n, 8):
                    where = slice(first, min(first + 8, at + n))
                    one.add(role, sign * x[where].astype(np.float32), sign * decided[where])
                at += n
        for one, sign in zip(both, (1, -1), strict=True):
            assert np.allclose(one.covariance(), np.cov(x[:40].T, bias=True), atol=5e-3)
            assert np.allclose(one.inputs(), sign * x[:40], atol=2e-3)
            assert np.array_equal(one.counts, (sign * decided[:40] > 0).sum(axis=0))
            sample = one.samples[statistics.THRESHOLDS]
            assert np.allclose(sample.x(), sign * x[40:70], atol=2e-3)
            assert np.array_equal(sample.active(5, 99), sign * decided[45:70] > 0)
            assert one.used() == pytest.approx((sign * decided[:40] > 0).sum() / 40)


def a_layer(spool, n=384, hidden=128):
    """A layer of neurons of which a quarter is active, and statistics of it."""
    random = np.random.default_rng(5)
    mix = random.standard_normal((hidden, hidden)) * np.geomspace(2, 0.05, hidden)
    w = random.standard_normal((n, hidden)).astype(np.float32)
    x = (random.standard_normal((4000, hidden)) @ mix.T).astype(np.float32)
    w -= 0.7 * np.linalg.norm(w, axis=1, keepdims=True) * x.std() / 8
    tokens = {statistics.FITTED: 2000, statistics.THRESHOLDS: 1000, statistics.MEASURE: 1000}
    stats, at = LayerStatistics(spool, hidden, n, tokens), 0
    for role, count in tokens.items():
        stats.add(role, x[at : at + count], x[at : at + count] @ w.T)
        at += count
    return LayerTask(0, n, hidden, 3 * hidden, lambda first, stop: w[first:stop], None), stats


@pytest.mark.parametrize("budget", [7_000, 9_500, 14_000, 40_000])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_offered_reaches_the_recall_however_little_it_may_keep(tmp_path, kind, budget):
    """Eight per cent of a small int8 layer are hardly a bit for every weight: what is made of them
    predicts too much rather than too little, or is refused."""
    with closing(Spool(tmp_path)) as spool, closing(choose_kernels(n_threads=1)) as kernels:
        task, stats = a_layer(spool)
        aims = Aims(0.98, (0.9, 0.98), (budget,), budget, (kind,))
        if budget < {"low_bit": 12_000, "low_rank": 8_000}[kind]:
            with pytest.raises(UsageError, match="larger share"):
                survey(task, stats, aims)
            return
        for option in survey(task, stats, aims):
            solved = measure(build(task, stats, aims, option), stats, aims, kernels, {})
            assert solved.resident_bytes == option.resident_bytes <= budget
            assert solved.layer.recall[1] == pytest.approx(0.98, abs=0.01)
            assert solved.layer.precision[1] >= 0.8 * stats.used() / task.n_bundles


def test_a_disk_without_room_is_refused(tmp_path):
    with closing(Spool(tmp_path)) as spool:
        spool.reserve(2**60)
        with pytest.raises(ConversionError, match="on this disk"):
            spool.require_room()


# ------------------------------------------------------------------------------- a tiny model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.container(tmp_path_factory.mktemp("fit"))


@pytest.fixture(scope="module", params=["low_bit", "low_rank"])
def fitted(request, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    path = folder / model.name
    shutil.copy(model, path)
    report = fit(str(path), text=TEXT, text_name="fox", recall=0.9, share=0.9, window=32,
                 n_tokens=900, kinds=(request.param,))  # fmt: skip
    return path, report


def test_a_fit_is_found_beside_the_model_and_used(fitted):
    path, report = fitted
    made = open_fit(f"{path}.fit")
    assert report.path.name == f"{path.name}.fit"
    with open_container(path) as container:
        made.require(container.digest)
    assert made.resident_bytes == report.resident_bytes <= 0.9 * report.streamed_bytes
    assert {0.9, 0.99} <= set(made.recalls)
    with LLM(str(path), mode="approx", recall=0.9, audit=1, n_context=64) as llm:
        result = llm.generate("once upon", max_tokens=20, temperature=0, ignore_eos=True)
    assert result.flash["mode"] == "approx" and result.flash["recall"] > 0.75


def test_what_is_reported_is_what_the_predictors_do(fitted):
    """Recall on the very text: it is short and all alike, so the thresholds fit all of it."""
    path, report = fitted
    with LLM(str(path), n_context=32, prefill_chunk=1) as llm:
        loaded = open_fit(f"{path}.fit").load(llm.kernels, 0.9)
        found, true = dict.fromkeys(loaded, 0), dict.fromkeys(loaded, 0)

        def observer(layer, x, decided):
            active = np.flatnonzero(decided[0] > 0)
            found[layer] += np.isin(active, loaded[layer].predict(x[0])).sum()
            true[layer] += active.size

        ids = llm.encode(TEXT, add_bos=False)[:300]
        for at in range(0, 300, 30):
            llm.observe(ids[at : at + 30], observer)
    for one in report.layers:
        n = one.layer.layer
        assert found[n] / true[n] == pytest.approx(0.9, abs=0.04)
        assert one.layer.recall[one.layer.thresholds.index(max(one.layer.thresholds))] < 0.9


def test_small_blocks_give_the_same_predictors(model, tmp_path, monkeypatch):
    said = []
    for rows in (512, 8):
        monkeypatch.setattr("flashllm.calibration.tasks.ROWS", rows)
        out = tmp_path / f"{rows}.fit"
        fit(str(model), text=TEXT, text_name="fox", share=0.9, window=32, n_tokens=600, out=out,
            kinds=("low_bit",))  # fmt: skip
        said.append([value for layer in open_fit(out).layers
                     for value in (*layer.recall, *layer.precision)])  # fmt: skip
    assert np.allclose(said[0], said[1], atol=0.02)  # the order of sums differs, no more


def test_units_are_predicted_whole(model, tmp_path):
    report = fit(str(model), text=TEXT, text_name="fox", share=0.9, window=32, n_tokens=600,
                 out=tmp_path / "u.fit", unit=4, kinds=("low_bit",))  # fmt: skip
    assert {one.layer.unit for one in report.layers} == {4}
    with LLM(str(model)) as llm:
        loaded = open_fit(tmp_path / "u.fit").load(llm.kernels, 0.8)
        x = np.random.default_rng(0).standard_normal(llm.config.hidden_size).astype(np.float32)
        for predictor in loaded.values():
            counts = np.bincount(predictor.predict(x) // 4)
            assert set(counts) <= {0, 4}


def test_another_container_is_refused(fitted, tmp_path):
    path, _ = fitted
    other = tiny.container(tmp_path, quant="int8")
    shutil.copy(f"{path}.fit", f"{other}.fit")
    with pytest.raises(FitMismatchError):
        LLM(str(other), mode="approx")


def test_what_cannot_be_fitted(model, tmp_path):
    with pytest.raises(UsageError, match="too few"):
        fit(str(model), text="a fox", text_name="t", out=tmp_path / "x.fit")
    with pytest.raises(UsageError, match="share"):
        fit(str(model), text=TEXT, text_name="t", out=tmp_path / "x.fit", window=32, share=0.001)
    with pytest.raises(BudgetError):
        fit(str(model), text=TEXT, text_name="t", out=tmp_path / "x.fit", ram_budget=2**20)
    dense = tiny.container(tmp_path, "llama-mha")
    with pytest.raises(UnsupportedError, match="naturally sparse"):
        fit(str(dense), text=TEXT, text_name="t", out=tmp_path / "x.fit", window=32)
    assert not list(tmp_path.glob("*.fit*"))


def test_the_verb_reports_and_puts_predictors_inside(model, tmp_path, capsys):
    ids, new = tmp_path / "ids.txt", tmp_path / "new.flash"
    with LLM(str(model)) as llm:
        ids.write_text(",".join(map(str, llm.encode(TEXT, add_bos=False))))
    command = ["fit", str(model), "--token-ids-file", str(ids), "--recall", "0.9", "--share", "0.9",
               "--window", "32", "--tokens", "600", "--kind", "low_bit", "-o", str(new)]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["asked"] == 0.9 and said["share"] <= 0.9 and said["path"] == str(new)
    assert {"recall", "precision", "resident_bytes", "microseconds"} <= set(said["layers"][0])
    assert main(command) == 2  # it exists
    with open_container(new) as inside, open_container(model) as outside:
        assert "predictors.fit.0" in inside.blobs and inside.digest != outside.digest
    assert main(["verify", str(new)]) == 0
    with LLM(str(new), mode="approx", recall=0.9, n_context=64) as llm:
        assert llm.generate("once", max_tokens=4, temperature=0).flash["mode"] == "approx"
    laid = tmp_path / "laid.flash"
    assert main(["relayout", str(new), "--bundle", "all", "-o", str(laid)]) == 0
    with open_container(laid) as moved:
        assert "predictors.fit.0" not in moved.blobs and "tokenizer.json" in moved.blobs
    assert {path.name for path in tmp_path.iterdir()} == {"ids.txt", "new.flash", "laid.flash"}


@capped.needs_cgroup
@pytest.mark.cgroup
def test_fitting_stays_inside_its_budget(model, tmp_path):
    path, text = tmp_path / model.name, tmp_path / "t.txt"
    shutil.copy(model, path)
    text.write_text(TEXT)
    budget = 128 * MIB
    run = capped.run([
        sys.executable, "-m", "flashllm", "fit", str(path), "--text", str(text), "--window", "32",
        "--share", "0.9", "--ram-budget", str(budget), "--json",
    ], budget)  # fmt: skip
    assert run.result["layers"] and run.charges.oom_kills == 0
