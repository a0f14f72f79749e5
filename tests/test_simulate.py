"""The simulator: miss for miss as a slow cache, byte for byte as a brute planner, golden counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flashllm.cache import POLICIES
from flashllm.cli.main import main
from flashllm.conversion.layout import fewest_bundles
from flashllm.errors import UsageError
from flashllm.offload.planner import worthwhile_gap
from flashllm.probe.named import CURVES
from flashllm.settings import SETTINGS
from flashllm.simulate import frames_used, replay, simulate
from flashllm.simulate.costs import cost
from flashllm.simulate.guesses import guesses
from flashllm.simulate.run import MAX_GAP, slots_by, slots_for
from flashllm.tracing import read_trace
from flashllm.tracing.activity import layer_use
from flashllm.tracing.order import order_for

from .slow_cache import slow_misses

TRACES = Path(__file__).parent.parent / "traces"


def random_active(seed: int, n_tokens=60, n=40, clusters=8):
    """(bits [tokens, n], first, ids): bundles i with equal i % clusters mostly fire together."""
    rng = np.random.default_rng(seed)
    which = rng.random((n_tokens, clusters)) < 0.2
    bits = which[:, np.arange(n) % clusters] & (rng.random((n_tokens, n)) < 0.9)
    first = np.concatenate(([0], np.cumsum(bits.sum(axis=1))))
    return bits, first, np.nonzero(bits)[1].astype(np.int32)


@pytest.mark.parametrize("per_frame", [1, 3, 7])
@pytest.mark.parametrize("shuffled", [False, True])
def test_frames_used_equals_the_obvious(per_frame, shuffled):
    bits, first, ids = random_active(1)
    order = np.random.default_rng(2).permutation(40) if shuffled else None
    uses = frames_used(first, ids, n_bundles=40, per_frame=per_frame, order=order)
    place = {int(b): i for i, b in enumerate(range(40) if order is None else order)}
    for t, wanted in enumerate(uses.steps()):
        at = [place[int(b)] // per_frame for b in np.flatnonzero(bits[t])]
        assert wanted.tolist() == sorted(set(at))
        slots = slice(uses.first[t], uses.first[t + 1])
        assert uses.n_active[slots].tolist() == [at.count(f) for f in sorted(set(at))]


@pytest.mark.parametrize("per_frame, unit", [(1, 4), (3, 2), (4, 4), (4, 8), (7, 3)])
def test_a_unit_is_wanted_whole(per_frame, unit):
    bits, first, ids = random_active(3)
    order = np.random.default_rng(4).permutation(40)
    uses = frames_used(first, ids, n_bundles=40, per_frame=per_frame, unit=unit, order=order)
    for t, wanted in enumerate(uses.steps()):
        active = [at for at in range(40) if bits[t, order[at]]]
        whole = [at for at in range(40) if any(at // unit == other // unit for other in active)]
        assert wanted.tolist() == sorted({at // per_frame for at in whole})
        counts = uses.n_active[uses.first[t] : uses.first[t + 1]].tolist()
        assert counts == [sum(at // per_frame == f for at in active) for f in wanted]


GUESSES = ["oracle", "dense", "window:1", "window:3", "noisy:0.8:0.5", "noisy:1:0.1", "noisy:1:1"]


@pytest.mark.parametrize("name", GUESSES)
def test_guesses_are_what_their_names_say(name):
    bits, first, ids = random_active(9)
    starts = np.array([0, 25])
    at, found = guesses(name, first, ids, n_bundles=40, starts=starts, seed=1)
    sets = [set(found[a:b].tolist()) for a, b in zip(at[:-1], at[1:], strict=True)]
    assert all(np.all(np.diff(found[a:b]) > 0) for a, b in zip(at[:-1], at[1:], strict=True))
    truth = [set(np.flatnonzero(row).tolist()) for row in bits]
    kind, _, options = name.partition(":")
    if kind == "oracle" or options == "1:1":
        assert sets == truth
    elif kind == "dense":
        assert sets == [set(range(40))] * len(bits)
    elif kind == "window":
        for t, said in enumerate(sets):
            begin = max(0 if t < 25 else 25, t - int(options))
            assert said == set().union(*truth[begin:t])
    else:
        recall, precision = map(float, options.split(":"))
        hits = sum(len(a & b) for a, b in zip(sets, truth, strict=True))
        assert hits / len(ids) == pytest.approx(recall, abs=0.06)
        if precision > 0.2:  # else there are too few to be wrong about
            assert hits / len(found) == pytest.approx(precision, abs=0.06)
    assert guesses("none", first, ids, n_bundles=40, starts=starts) is None


@pytest.mark.parametrize("per_frame, unit", [(1, 1), (3, 1), (1, 4), (4, 3)])
def test_what_is_asked_ahead_is_wanted_and_what_it_wastes_is_counted(per_frame, unit):
    bits, first, ids = random_active(10)
    order = np.random.default_rng(11).permutation(40)
    place = {int(b): i for i, b in enumerate(order)}
    asked = guesses("noisy:0.7:0.4", first, ids, n_bundles=40, starts=np.array([0]))
    uses = frames_used(first, ids, n_bundles=40, per_frame=per_frame, unit=unit, order=order,
                       asked=asked)  # fmt: skip

    def frames(bundles) -> set[int]:
        units = {place[int(b)] // unit for b in bundles}
        return {at // per_frame for at in range(40) if at // unit in units}

    wasted = 0
    for t, wanted in enumerate(uses.steps()):
        ahead = frames(asked[1][asked[0][t] : asked[0][t + 1]])
        assert wanted.tolist() == sorted(ahead | frames(np.flatnonzero(bits[t])))
        here = slice(uses.first[t], uses.first[t + 1])
        assert [bool(f) for f in uses.ahead[here]] == [f in ahead for f in wanted]
        used = {place[int(b)] // per_frame for b in np.flatnonzero(bits[t])}
        wasted += len(ahead - used)
        assert sum(uses.n_active[here]) == bits[t].sum()
    found = replay(uses, POLICIES["lru"](uses.n_frames))
    assert np.count_nonzero(uses.ahead & (uses.n_active == 0)) == wasted
    assert len(found.where(found.ahead)) + len(found.where(~found.ahead)) == len(found)


def test_a_predictor_that_knows_reads_no_more_and_one_that_guesses_wastes():
    trace = read_trace(TRACES / "stories-test.fltrace")
    rows = simulate(
        trace, policies=["lru"], caches=[0.5], per_frames=[1], curves=[CURVES["ufs4"]],
        predictors=["none", "oracle", "window:4", "dense", "noisy:0.99:0.5"],
    )  # fmt: skip
    none, oracle, window, dense, noisy = rows
    assert oracle.misses == none.misses and oracle.recall == oracle.precision == 1.0
    assert none.recall is None and none.ahead_bytes_per_token == 0.0
    assert oracle.ms == none.ms and oracle.wasted_bytes_per_token == 0.0
    assert noisy.recall == pytest.approx(0.99, abs=2e-3)
    assert noisy.precision == pytest.approx(0.5, abs=2e-3)
    assert 0 < noisy.wasted_bytes_per_token < dense.wasted_bytes_per_token
    assert 0 < window.wasted_bytes_per_token <= window.ahead_bytes_per_token
    assert dense.ahead_bytes_per_token == pytest.approx(dense.misses_per_token * dense.frame_bytes)


def test_slots_by_use_serve_the_layers_that_are_used():
    assert slots_by(0.5, [100, 100], None) == [50, 50]
    assert slots_by(0.5, [100, 100], [0.3, 0.1]) == [75, 25]
    assert slots_by(0.75, [100, 100], [0.9, 0.1]) == [100, 50]  # no layer gets more than it has
    assert slots_by(0.5, [100, 100], [0.5, 0.0]) == [100, 1]
    trace = read_trace(TRACES / "demo-books-test.fltrace")
    other = layer_use(read_trace(TRACES / "demo-books-fit.fltrace"))
    equal, use = simulate(
        trace, policies=["lfu"], caches=[0.25], per_frames=[1], curves=[CURVES["ufs4"]],
        shares={"equal": None, "use": other}, bundle_bytes=4096,
    )  # fmt: skip
    assert use.misses < 0.85 * equal.misses and use.ms["ufs4"] < equal.ms["ufs4"]


@pytest.mark.parametrize("name", POLICIES.names())
@pytest.mark.parametrize("n_slots", [1, 4, 9, 20, 40])
def test_replay_misses_what_the_slow_cache_misses(name, n_slots):
    _, first, ids = random_active(5)
    uses = frames_used(first, ids, n_bundles=40, per_frame=1)
    extra = {"future": uses.steps()} if name == "belady" else {}
    found = replay(uses, POLICIES[name](n_slots, **extra))
    expected = slow_misses(uses.steps(), n_slots, name)
    assert list(zip(found.token.tolist(), found.frame.tolist(), strict=True)) == expected
    if n_slots == 40:
        assert len(found) == len(np.unique(ids))  # each is missed once


@pytest.mark.parametrize("curve", list(CURVES))
def test_costs_equal_reads_merged_by_hand(curve):
    curve = CURVES[curve]
    _, first, ids = random_active(6)
    uses = frames_used(first, ids, n_bundles=40, per_frame=1)
    misses = replay(uses, POLICIES["lru"](8))
    frame_bytes, gap = 6144, worthwhile_gap(curve, bytes_each=6144, limit=MAX_GAP)
    n_ops = n_bytes = 0
    seconds = 0.0
    for t in range(uses.n_tokens):
        frames = misses.frame[misses.token == t].tolist()
        reads: list[list[int]] = []
        for f in frames:
            if reads and (f - reads[-1][1] - 1) * frame_bytes <= gap:
                reads[-1][1] = f
            else:
                reads.append([f, f])
        total = sum(b - a + 1 for a, b in reads) * frame_bytes
        n_ops, n_bytes = n_ops + len(reads), n_bytes + total
        seconds += curve.seconds(len(reads), total / len(reads)) if reads else 0.0
    found = cost(misses, curve, frame_bytes=frame_bytes, gap_limit=MAX_GAP)
    assert (found.n_ops, found.n_bytes) == (n_ops, n_bytes)
    assert found.seconds == pytest.approx(seconds)


def test_named_curves_are_ordered_and_many_equals_one_by_one():
    n_ops, sizes = np.array([0, 1, 3, 16, 400]), np.array([4096.0, 512, 70_000, 3e6, 6144])
    for _, curve in CURVES.items():
        each = curve.seconds_each(n_ops, sizes)
        assert each == pytest.approx([curve.seconds(n, s) for n, s in zip(n_ops, sizes,
                                                                          strict=True)])
    costs = [CURVES[name].seconds(64, 6144) for name in ("nvme4", "ufs4", "emmc", "sd")]
    assert costs == sorted(costs)


def test_an_order_brings_together_what_fires_together():
    fit, _, _ = random_active(7, n_tokens=200)
    _, first, ids = random_active(8)
    order = order_for(fit, per_frame=5)
    assert sorted(order.tolist()) == list(range(40))
    for start in range(0, 40, 5):
        assert len({int(b) % 8 for b in order[start : start + 5]}) == 1
    plain = frames_used(first, ids, n_bundles=40, per_frame=5)
    laid = frames_used(first, ids, n_bundles=40, per_frame=5, order=order)
    assert len(laid.frames) < 0.5 * len(plain.frames)
    fit[:, :11] = False
    assert order_for(fit, per_frame=4)[-11:].tolist() == list(range(11))
    assert order_for(np.zeros((3, 6), bool), per_frame=4).tolist() == list(range(6))


# misses of whole traces: policy -> with caches of 10 and 50 % of each layer, one bundle a frame;
# `wanted` is how many were asked for
GOLDEN = {
    "demo-books-test": {
        "wanted": [419848],
        "window": [324589, 134869],
        "lru": [324319, 121204],
        "lfu": [320409, 103921],
        "belady": [275547, 55690],
    },
    "demo-plays-test": {
        "wanted": [537030],
        "lfu": [379926, 110240],
        "belady": [335131, 59566],
    },
    "stories-test": {
        "wanted": [81890],
        "window": [69191, 32474],
        "lru": [69191, 32488],
        "lfu": [69190, 31894],
        "belady": [69182, 19581],
    },
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_miss_counts(name):
    trace = read_trace(TRACES / f"{name}.fltrace")
    rows = simulate(trace, policies=list(GOLDEN[name])[1:], caches=[0.1, 0.5],
                    per_frames=[1], curves=[CURVES["default"]])  # fmt: skip
    found: dict[str, list[int]] = {}
    for row in rows:
        found.setdefault(row.policy, []).append(row.misses)
    wanted = sum(int(trace.bits(i).sum()) for i in range(len(trace.layers)))
    assert {"wanted": [wanted], **found} == GOLDEN[name]
    for row in rows:
        assert row.hit_rate == pytest.approx(1 - row.misses / wanted)
        assert row.above_belady >= 0 and 0 < row.useful <= 1


def test_the_defaults_are_what_won_in_the_cards():
    results = TRACES.parent / "bench" / "results"
    rows = json.loads((results / "policies.json").read_text())["rows"]
    misses = {(r["trace"], r["cache"], r["policy"]): r["misses"] for r in rows
              if r["table"] == "policies"}  # fmt: skip
    places = sorted({key[:2] for key in misses})
    ratios = {
        policy: sum(misses[*at, policy] / misses[*at, "lru"] for at in places)
        for policy in {key[2] for key in misses} - {"belady"}
    }
    best, default = min(ratios, key=ratios.get), SETTINGS["policy"].default
    assert best == f"{default}:{POLICIES[default](1).decay:g}"
    # by what layers use: less flash time than equal shares, taken over all devices and caches
    mine = [r for r in rows if r["table"] == "shares"]
    use, equal = ([sum(r["ms"].values()) for r in mine if r["shares"] == name]
                  for name in ("use", "equal"))  # fmt: skip
    assert len(use) == len(equal) and sum(use) < sum(equal)
    # single neurons, not clusters
    rows = json.loads((results / "clusters.json").read_text())["rows"]
    sums: dict[tuple[int, int], float] = {}
    for row in (r for r in rows if r["order"] == "fitted" and r["frame_bytes"] % 4096 == 0):
        if row["frame_bytes"] // row["per_frame"] == 4096:
            at = (row["unit"], row["per_frame"])
            sums[at] = sums.get(at, 0.0) + sum(row["ms"].values())
    assert min(sums, key=sums.get) == (1, fewest_bundles(4096, 10_000)) == (1, 1)


def test_every_committed_trace_is_whole_and_has_its_card():
    paths = sorted(TRACES.glob("*.fltrace"))
    assert len(paths) >= 4
    for path in paths:
        trace = read_trace(path)
        card = path.with_suffix(".md").read_text()
        assert f"`{trace.model}`" in card and f"`{trace.text}`" in card
        assert f"{path.stat().st_size} bytes" in card


def test_the_verb_prints_a_table_or_json(capsys):
    path = str(TRACES / "stories-test.fltrace")
    args = ["simulate", path, "--policy", "lru,belady", "--cache", "10%,50%", "--curve", "ufs4,sd"]
    assert main([*args, "--order", str(TRACES / "stories-fit.fltrace"), "--per-frame", "2,8"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + 2 * 2 * 2 * 2 and "sd ms" in table[0]
    assert main([*args, "--json", "--bundle-bytes", "6KiB"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["policy"], r["cache"]) for r in rows] == [
        ("lru", 0.1), ("belady", 0.1), ("lru", 0.5), ("belady", 0.5)
    ]  # fmt: skip
    assert all(r["ms"].keys() == {"ufs4", "sd"} and r["frame_bytes"] == 6144 for r in rows)


@pytest.mark.parametrize(
    "args",
    [
        ["--policy", "clock"], ["--cache", "0%"], ["--cache", "much"], ["--cache", "101%"],
        ["--per-frame", "0"], ["--per-frame", "x"],
        ["--unit", "0"], ["--policy", "lfu:2"], ["--policy", "lru:3"], ["--policy", "window:x"],
         ["--curve", "drum"], ["--bundle-bytes", "-"],
        ["--predictor", "fortune"], ["--predictor", "window:0"], ["--predictor", "noisy:0.9"],
        ["--predictor", "noisy:2:0.5"], ["--predictor", "oracle:1"], ["--shares", "fair"],
        ["--order", str(TRACES / "demo-books-fit.fltrace")],
    ],
)  # fmt: skip
def test_what_cannot_be_simulated(args, capsys):
    assert main(["simulate", str(TRACES / "stories-test.fltrace"), *args]) == 2
    assert "flashllm:" in capsys.readouterr().err


def test_a_policys_option_is_its_argument():
    trace = read_trace(TRACES / "stories-test.fltrace")
    names = ["window", "window:5", "window:1", "lfu:0.99", "lfu", "lfu:0.5"]
    rows = simulate(trace, policies=names, caches=[0.5], per_frames=[1],
                    curves=[CURVES["default"]])  # fmt: skip
    found = {row.policy: row.misses for row in rows}
    assert found["window"] == found["window:5"] != found["window:1"]
    assert found["lfu"] == found["lfu:0.99"] != found["lfu:0.5"]


def test_slots_and_their_bounds():
    assert [slots_for(s, 10) for s in (0.01, 0.25, 1.0)] == [1, 2, 10]
    with pytest.raises(UsageError):
        simulate(None, policies=[], caches=[0.5], per_frames=[1], curves=[])
