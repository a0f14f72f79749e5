"""Approximate mode: what is computed is what was predicted, and nothing else decides it."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest

from flashllm import LLM, assembly
from flashllm.calibration.density import LOWEST, N_BINS, PER_OCTAVE, calibrate, threshold
from flashllm.cli.main import main
from flashllm.container import open_container
from flashllm.conversion.enlarge import inflate
from flashllm.conversion.from_container import PlaneReader
from flashllm.conversion.relayout import relayout
from flashllm.errors import (
    FitMismatchError,
    FlashReadError,
    FormatError,
    UnknownNameError,
    UnsupportedError,
    UsageError,
)
from flashllm.evaluation import negative_log_likelihood
from flashllm.kernels import choose_kernels
from flashllm.kernels.base import PieceView, weight_code
from flashllm.models import approximate
from flashllm.offload import WeightStore
from flashllm.offload.planner import Pace
from flashllm.predictors import DensePredictor, OraclePredictor, Predictor
from flashllm.predictors.magnitude import MAX_BYTES, density_path, read_magnitudes
from flashllm.probe.curve import DEFAULT_CURVE
from flashllm.units import MIB

from . import fits, tiny
from .forced import nothing_recorded, opened
from .tiny import GOLDEN

IDS = [3, 17, 40, 8, 8, 22, 61]
N_TOKENS = 18
COUNTED = (
    "active_bundles", "all_bundles", "predicted_bundles", "wasted_rows", "recall", "precision",
    "density", "hits", "misses",
)  # fmt: skip
KINDS = {
    "gated apart": ("llama-relu-biases", "split"),
    "gated bundled": ("llama-relu-biases", "all"),
    "ungated bundled": ("llama-ungated-relu2", "all"),
}


class Truth:
    """Which neurons of a layer are truly active, computed with the deciding rows in memory."""

    def __init__(self, container, layer: int, kernels):
        rows = container.planes.get(f"layers.{layer}.deciding")
        plane = rows or container.planes[f"layers.{layer}.ffn"]
        piece = plane.pieces[0]
        self.data = PlaneReader(plane, container).whole(0, plane.n_items)
        self.view = PieceView(
            weight_code(piece.weight_type), plane.n_items, plane.stride, piece.offset, piece.n_cols
        )
        self.bias = container.load_vectors().get(f"layers.{layer}.deciding.bias", 0)
        self.n, self.kernels = plane.n_items, kernels
        self.activations = kernels.activations(1, piece.n_cols)
        self.addresses = np.array([self.data.ctypes.data], np.uint64)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        out = np.empty((1, self.n), np.float32)
        self.kernels.prepare(self.activations, x[None], self.view)
        every = np.arange(self.n, dtype=np.int32)
        self.kernels.dot_ids(self.activations, self.addresses, self.view, every, out)
        return np.flatnonzero(out[0] + self.bias > 0).astype(np.int32)


class Forgetful(Predictor):
    """The truth less every third neuron, and every 16th neuron besides; remembers what it said."""

    name = "forgetful"
    resident_bytes = 4096

    def __init__(self, truth: Truth):
        super().__init__(truth.n)
        self.truth, self.said = truth, []

    def predict(self, x: np.ndarray) -> np.ndarray:
        every = np.arange(self.n_bundles, dtype=np.int32)
        true = self.truth(x)
        ids = np.union1d(true[true % 3 != 0], every[::16]).astype(np.int32)
        self.said.append((true, ids))
        return ids

    def reset(self) -> None:
        self.said.clear()


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """(path, layer -> truth, the exact run's tokens and logits)."""
    variant, bundle = KINDS[request.param]
    folder = tmp_path_factory.mktemp("approx")
    plain, path = folder / "plain.flash", folder / "model.flash"
    inflate(GOLDEN / variant, plain, size_bytes=MIB, quant="int8", min_layers=2)
    relayout(plain, path, bundle=bundle, per_frame=3)
    kernels = choose_kernels("auto", n_threads=1)
    with open_container(path) as container:
        n = container.config["n_layers"]
        truths = {layer: Truth(container, layer, kernels) for layer in range(n)}
    with LLM(str(path), ram_budget="1GiB") as llm:
        exact = llm.generate(IDS, max_tokens=N_TOKENS, temperature=0, ignore_eos=True, logprobs=5)
    yield str(path), truths, exact
    kernels.close()


def run(path, predictors, monkeypatch, *, share=1.0, store_mode=None, **settings):
    """An approximate run with `share` of every plane kept."""
    store = {"mode": store_mode} if store_mode else {}
    with opened(
        path, monkeypatch, share=share, store=store, ram_budget="1GiB", mode="approx",
        predictors=predictors, **settings,
    ) as llm:  # fmt: skip
        return llm.generate(IDS, max_tokens=N_TOKENS, temperature=0, ignore_eos=True, logprobs=5)


WAYS = [
    {},
    {"share": 0.0},
    {"share": 0.3, "prefill_chunk": 2},
    {"share": 0.5, "storage": "pread", "policy": "lfu"},
    {"share": 0.2, "store_mode": "sweep", "audit": 3},
    {"share": 0.4, "storage": "mmap", "store_mode": "cached", "audit": 1},
    {"share": 0.6, "num_threads": 1, "audit": 0},
]


@pytest.mark.parametrize("how", WAYS[1:5], ids=str)
def test_an_oracle_gives_the_exact_bits(made, monkeypatch, how):
    path, truths, exact = made
    oracles = {i: OraclePredictor(truth.n, truth=truth) for i, truth in truths.items()}
    result = run(path, oracles, monkeypatch, **how)
    assert result.tokens == exact.tokens and result.logprobs == exact.logprobs
    flash = result.flash
    assert flash["mode"] == "approx"
    audited = how.get("audit", 16) > 0
    assert flash["recall"] == (1.0 if audited else None)
    assert flash["precision"] == (1.0 if audited else None)
    assert flash["predicted_bundles"] == flash["active_bundles"] == exact.flash["active_bundles"]
    assert flash["all_bundles"] == exact.flash["all_bundles"] > flash["active_bundles"]


def test_everything_predicted_is_exact_too(made, monkeypatch):
    path, truths, exact = made
    everything = {i: DensePredictor(truth.n) for i, truth in truths.items()}
    result = run(path, everything, monkeypatch, share=0.3)
    assert result.tokens == exact.tokens and result.logprobs == exact.logprobs
    assert result.flash["recall"] == 1.0
    assert result.flash["predicted_bundles"] == result.flash["all_bundles"]


@pytest.mark.parametrize("least", [10**9, 16], ids=["whole layers", "slices"])
def test_what_is_left_out_depends_on_nothing_else(made, monkeypatch, least):
    path, truths, exact = made
    monkeypatch.setattr(approximate, "AUDIT_LEAST", least)
    monkeypatch.setattr(approximate, "AUDIT_BLOCK", 5)
    seen = []
    for how in WAYS:
        predictors = {i: Forgetful(truth) for i, truth in truths.items()}
        result = run(path, predictors, monkeypatch, **how)
        seen.append((result.tokens, result.logprobs, result.flash["active_bundles"]))
        flash, every = result.flash, how.get("audit", 16)
        assert flash["predicted_bundles"] == flash["predicted_rows"]
        if every == 0:
            assert flash["recall"] is None and flash["precision"] is None
            assert flash["audit_bytes"] == 0
            continue
        n_true, n_said, n_found = 0, 0, 0
        for layer, predictor in predictors.items():
            for turn, (true, ids) in enumerate(predictor.said[::every]):
                part = approximate.Slice.of(predictor.n_bundles, turn + layer).ids()
                n_true += np.isin(true, part).sum()
                n_said += np.isin(ids, part).sum()
                n_found += np.isin(np.intersect1d(true, ids), part).sum()
        assert flash["recall"] == n_found / n_true < 1
        assert flash["precision"] == n_found / n_said < 1
        assert (flash["audit_bytes"] > 0) == (how.get("share", 1) < 1)
    assert all(one == seen[0] for one in seen)
    assert seen[0][1] != exact.logprobs


@pytest.mark.parametrize("n", [1, 511, 1024, 5632, 15361])
def test_slices_see_every_neuron_once(n):
    n_slices = approximate.Slice.of(n, 0).n_slices
    parts = [approximate.Slice.of(n, turn) for turn in range(3, 3 + n_slices)]
    assert n_slices == min(16, max(1, n // 512))
    every = np.concatenate([part.ids() for part in parts])
    np.testing.assert_array_equal(np.sort(every), np.arange(n))
    some = np.arange(0, n, 3, dtype=np.int32)
    assert [part.count(some) for part in parts] == [
        np.isin(part.ids(), some).sum() for part in parts
    ]


def test_audits_read_apart(made, monkeypatch):
    path, truths, _ = made
    # What is read across depends on what the disk was found to take: the same for both.
    monkeypatch.setattr(assembly.opening, "probe_device", lambda *given, **named: DEFAULT_CURVE)
    monkeypatch.setattr(Pace, "note", lambda self, **found: None)
    read = []
    for audit in (0, 4):
        predictors = {i: Forgetful(truth) for i, truth in truths.items()}
        how = {"share": 0.3, "store_mode": "cached", "storage": "pread", "audit": audit}
        result = run(path, predictors, monkeypatch, **how)
        read.append((result.flash["decode_bytes_read"], result.flash["read_bundles"]))
    assert read[0] == read[1]
    assert 0 < read[0][1] < result.flash["all_bundles"]


def test_a_layer_without_a_predictor_is_exact(made, monkeypatch):
    path, truths, exact = made
    oracle = {0: OraclePredictor(truths[0].n, truth=truths[0])}
    assert run(path, oracle, monkeypatch, share=0.3).tokens == exact.tokens


def test_prompts_are_exact_and_perplexity_decodes(made):
    path, truths, _ = made
    predictors = {i: Forgetful(truth) for i, truth in truths.items()}
    with LLM(path) as exact, LLM(path, mode="approx", predictors=predictors) as approx:
        np.testing.assert_array_equal(exact.logits(IDS), approx.logits(IDS))

        def followed(llm):
            pieces = llm.logit_pieces(IDS, piece_bytes=700, decoding=True)
            return np.concatenate([rows.copy() for _, rows in pieces])

        np.testing.assert_array_equal(followed(exact), exact.logits(IDS))
        assert (followed(approx)[0] == exact.logits(IDS)[0]).all()
        assert np.abs(followed(approx)[1:] - exact.logits(IDS)[1:]).max() > 0


def test_perplexity_says_what_was_computed(tmp_path):
    path = str(tiny.container(tmp_path, "llama-relu"))
    with LLM(path) as llm, LLM(path) as again:
        nats, n = negative_log_likelihood(llm, "a fox was old, a fox was old")
        oracle = _oracles(path)
    with LLM(path, mode="approx", predictors=oracle) as again:
        assert (nats, n) == negative_log_likelihood(again, "a fox was old, a fox was old")


def _oracles(path):
    kernels = choose_kernels("auto", n_threads=1)
    with open_container(path) as container:
        truths = [Truth(container, i, kernels) for i in range(container.config["n_layers"])]
    return {i: OraclePredictor(truth.n, truth=truth) for i, truth in enumerate(truths)}


@pytest.mark.parametrize("bundle", ["all", "split"])
@pytest.mark.parametrize("share, kept", [(1.0, "none"), (0.4, "none"), (0.4, "deciding")])
@pytest.mark.parametrize("mode", ["approx", "exact"])
@pytest.mark.parametrize("audit", [0, 3])
@pytest.mark.parametrize("variant", ["llama-relu", "nemotron"])
def test_repeated_tokens_say_and_count_the_same(
    tmp_path, monkeypatch, variant, bundle, share, kept, mode, audit
):
    """With the FFNs recorded, as far as they are operators alone, and through the interpreter."""
    path = str(tmp_path / "m.flash")
    relayout(tiny.container(tmp_path, variant), path, bundle=bundle, per_frame=3)
    n_layers = fits.beside(path)
    how = {"ram_budget": "1GiB", "mode": mode, "audit": audit, "debug": True}
    how |= {"recall": 0.9} if mode == "approx" else {}
    how["store"] = {"mode": "cached"}  # otherwise measured times decide what is kept, thus hits
    found = []
    for plainly in (False, True):
        with (
            monkeypatch.context() as patch,
            opened(path, patch, share=share, whole=kept, **how) as llm,
        ):
            if plainly:
                nothing_recorded(patch)
            result = llm.generate(IDS, max_tokens=9, temperature=0, ignore_eos=True, logprobs=5)
            counted = {name: result.flash[name] for name in COUNTED}
            found.append((result.tokens, result.logprobs, counted))
            n_repeated = llm.model.repeats.n_recorded
            whole, streamed = len(llm.model._whole_layers), len(llm.model._streamed_layers)
        begins = mode == "approx" or bundle == "split" and (share == 1 or kept == "deciding")
        assert (n_repeated == 0) == (plainly or share < 1 and not begins)
        operators = begins and (bundle == "all") == (mode == "approx")
        assert plainly or whole == n_layers * (operators and share == 1)
        assert plainly or streamed == n_layers * (operators and share < 1)
    assert found[0] == found[1] and counted["active_bundles"] > 0


@pytest.mark.parametrize("quant", ["f32", "int8"])
@pytest.mark.parametrize("n_leases", [0, 5])
def test_requests_that_arrive_after_tokens_of_leases(tmp_path, monkeypatch, quant, n_leases):
    """What adds neurons is then recorded when what prepares for it is repeated already."""
    path = str(tmp_path / "m.flash")
    relayout(tiny.container(tmp_path, "llama-relu", quant=quant), path, bundle="all", per_frame=3)
    n_layers = fits.beside(path)
    how = {"ram_budget": "1GiB", "mode": "approx", "recall": 0.9, "audit": 0, "share": 0.4}
    how["store"] = {"mode": "cached"}
    found = []
    for n in (n_leases * n_layers, 10**6):
        left, arriving = [n], WeightStore.arriving

        def late(self, plane, ids, left=left, arriving=arriving):
            left[0] -= 1
            return None if left[0] >= 0 else arriving(self, plane, ids)

        with monkeypatch.context() as patch, opened(path, patch, **how) as llm:
            patch.setattr(WeightStore, "arriving", late)
            result = llm.generate(IDS, max_tokens=12, temperature=0, ignore_eos=True, logprobs=5)
            assert len(llm.model._streamed_layers) == n_layers
            assert (len(llm.model._add_calls) == n_layers) == (n < 10**6)
            counted = {name: result.flash[name] for name in COUNTED}
            found.append((result.tokens, result.logprobs, counted))
    assert found[0] == found[1]


def test_a_fit_beside_the_container_is_used(tmp_path, capsys):
    path = str(tiny.container(tmp_path, "llama-relu"))
    fits.beside(path)
    said = []
    for recall in ("0.5", "0.9"):
        for budget in ("500MiB", "1GiB"):
            ask = ["generate", path, "--token-ids", "3,17,40", "--max-tokens", "4", "--json",
                   "--temperature", "0", "--ignore-eos", "--mode", "approx", "--recall", recall,
                   "--ram-budget", budget]  # fmt: skip
            assert main(ask) == 0
            said.append(json.loads(capsys.readouterr().out))
    flash = [one["flash"] for one in said]
    assert said[0]["tokens"] == said[1]["tokens"] and said[2]["tokens"] == said[3]["tokens"]
    for name in ("recall", "precision", "predicted_bundles"):
        assert flash[0][name] == flash[1][name] != flash[2][name] == flash[3][name]
    assert flash[2]["recall"] > flash[0]["recall"]
    assert flash[0]["mode"] == "approx"

    ask = ["perplexity", path, "--text", "-", "--mode", "approx", "--recall", "0.9"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("a fox was old, a fox was old"))
        assert main(ask) == 0
    assert "approx: prompt exact, recall" in capsys.readouterr().out
    assert main(["estimate", path, "--mode", "approx", "--recall", "0.9"]) == 0
    assert "predictors" in capsys.readouterr().out
    assert main(["estimate", path, "--mode", "approx", "--recall", "0.95"]) == 2
    assert "fitted for up to 0.9" in capsys.readouterr().err
    fits.beside(path, "ab" * 32)
    with pytest.raises(FitMismatchError):
        LLM(path, mode="approx")


@pytest.mark.parametrize("variant", ["llama-mha", "qwen3"])
def test_density_of_a_model_without_zeros(variant, tmp_path, monkeypatch):
    plain, path = tmp_path / f"{variant}.flash", str(tmp_path / "s.flash")
    tiny.container(tmp_path, variant, quant="int8", bundle="all")
    with LLM(str(plain)) as llm, pytest.raises(UnsupportedError, match="relayout --bundle split"):
        calibrate(llm, "a fox", densities=[0.5], n_tokens=9)
    relayout(plain, path, bundle="split", per_frame=2)
    with pytest.raises(UsageError, match="needs a density"):
        LLM(path, mode="approx")
    with LLM(path, prefill_chunk=5) as llm:
        found = calibrate(llm, "a fox was old! " * 9, densities=[0.5, 0.25], n_tokens=99)
        exact = llm.generate(IDS, max_tokens=9, temperature=0, ignore_eos=True, logprobs=5)
    assert found.densities == (0.25, 0.5) and found.n_tokens == 99
    found.save(density_path(path))
    assert read_magnitudes(density_path(path)) == found
    seen = []
    for share in (1.0, 0.4, 0.0):
        result = run(path, None, monkeypatch, share=share, density=0.5)
        seen.append((result.tokens, result.logprobs))
        assert result.flash["recall"] is None and result.flash["audit_bytes"] == 0
        assert 0.3 < result.flash["density"] < 0.7
    assert all(one == seen[0] for one in seen)
    assert seen[0][1][:9] != exact.logprobs
    every = dataclasses.replace(found, layers={i: (0.0, 0.0) for i in found.layers})
    every.save(density_path(path))
    assert run(path, None, monkeypatch, share=0.4, density=0.5).logprobs[:9] == exact.logprobs
    with pytest.raises(UsageError, match="calibrated: 0.25, 0.5"):
        LLM(path, mode="approx", density=0.6)
    dataclasses.replace(found, model="ab" * 32).save(density_path(path))
    with pytest.raises(FitMismatchError):
        LLM(path, mode="approx", density=0.5)


def test_density_from_the_command_line(tmp_path, capsys):
    plain, path = str(tiny.checkpoint(tmp_path, "llama-mha")), str(tmp_path / "s.flash")
    text = tmp_path / "t.txt"
    text.write_text("a fox was old! " * 20)
    assert main(["convert", plain, path, "--bundle", "split"]) == 0
    fit = ["fit", path, "--text", str(text), "--density", "0.45"]
    assert main([*fit, "--recall", "0.9"]) == 2 and "--recall" in capsys.readouterr().err
    assert main([*fit, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tokens"] == 304 and said["path"] == f"{path}.density"
    assert 0.45 in said["densities"] and len(said["layers"]) > 0
    assert main(fit) == 2 and "exists" in capsys.readouterr().err
    ask = ["generate", path, "--token-ids", "3,17,40", "--max-tokens", "4", "--mode", "approx"]
    assert main([*ask, "--density", "0.45"]) == 0
    assert "approx: prompt exact" in capsys.readouterr().err
    assert main([*ask, "--density", "0.41"]) == 2
    assert "calibrated: 0.3, 0.4, 0.45" in capsys.readouterr().err
    assert main([*ask]) == 2 and "fit --density" in capsys.readouterr().err


GOOD = {"densities": [0.3, 0.5], "layers": {"0": [0.2, 0.1]}, "model": "ab" * 32, "n_tokens": 4,
        "text": "cd" * 32, "version": 1}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2}, {"more": 1}, {"model": "ab"}, {"text": 5}, {"n_tokens": 0},
        {"n_tokens": True}, {"densities": []}, {"densities": [0.5, 0.3]}, {"densities": [0.3, 1.0]},
        {"densities": [0.3, float("nan")]}, {"densities": [i / 100 for i in range(1, 99)]},
        {"layers": {}}, {"layers": []}, {"layers": {"0": [0.2]}}, {"layers": {"0": [0.2, -1]}},
        {"layers": {"x": [0.2, 0.1]}}, {"layers": {"99999": [0.2, 0.1]}}, {"layers": {"0": "ab"}},
        {"layers": {"0": [1e999, 0.1]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_of_thresholds_is_read_with_suspicion(tmp_path, changes):
    path = tmp_path / "x.density"
    path.write_text(json.dumps(GOOD))
    assert read_magnitudes(path).thresholds(0.5) == {0: 0.1}
    path.write_text(json.dumps({**GOOD, **changes}))
    with pytest.raises(UnsupportedError if "version" in changes else FormatError):
        read_magnitudes(path)


def test_what_is_no_file_of_thresholds(tmp_path):
    path = tmp_path / "x.density"
    with pytest.raises(FlashReadError):
        read_magnitudes(path)
    for text in ("", "[" * 100_000, "[]", "{", " " * (MAX_BYTES + 1)):
        path.write_text(text)
        with pytest.raises(FormatError):
            read_magnitudes(path)


def test_a_threshold_is_the_quantile():
    magnitude = np.random.default_rng(0).exponential(size=20_000)
    bins = ((np.log2(magnitude) - LOWEST) * PER_OCTAVE).astype(int)
    counts = np.bincount(np.clip(bins, 0, N_BINS - 1), minlength=N_BINS)
    for density in (0.01, 0.3, 0.5, 0.9):
        assert abs(np.mean(magnitude >= threshold(counts, density)) - density) < 0.01
    assert threshold(counts, 1e-9) <= magnitude.max() < 2 * threshold(counts, 1e-9)


def test_predictors_are_in_the_ledger(made):
    path, truths, _ = made
    predictors = {i: Forgetful(truth) for i, truth in truths.items()}
    with LLM(path, mode="approx", predictors=predictors) as llm:
        assert llm.plan.ledger["predictors"] == 4096 * len(truths)


def test_what_is_refused(made, tmp_path):
    path, truths, _ = made
    with pytest.raises(UnknownNameError, match="mode"):
        LLM(path, mode="fast")
    with pytest.raises(UsageError, match="flashllm fit"):
        LLM(path, mode="approx")
    with pytest.raises(UsageError, match="decide nothing"):
        LLM(path, predictors={0: DensePredictor(truths[0].n)})
    with pytest.raises(UsageError, match="knows 5 bundles"):
        LLM(path, mode="approx", predictors={0: DensePredictor(5)})
    with pytest.raises(UsageError, match="layer 77"):
        LLM(path, mode="approx", predictors={77: DensePredictor(5)})
    with pytest.raises(UsageError, match="audit"):
        LLM(path, mode="approx", predictors={}, audit=-1)
    with pytest.raises(UsageError, match="ask for a recall"):
        LLM(path, mode="approx", density=0.5)
