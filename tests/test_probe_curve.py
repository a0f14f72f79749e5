"""DeviceCurve: interpolation, files, and curves that cannot be."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flashllm.errors import FlashReadError, FormatError, UsageError
from flashllm.probe.curve import DEFAULT_CURVE, DeviceCurve, Point

CURVE = DeviceCurve(
    "made up",
    (
        Point(1, 1000, 1.0),
        Point(1, 3000, 2.0),
        Point(16, 1000, 0.25),
        Point(16, 3000, 0.2),  # noise: larger, yet cheaper
        Point(16, 5000, 0.5),
    ),
)


@pytest.mark.parametrize(
    ("bytes_each", "depth", "expected"),
    [
        (1, 1, 1.0),
        (1000, 1, 1.0),
        (2000, 1, 1.5),
        (6000, 1, 4.0),
        (2000, 8, 1.5),  # the nearest depth that is not above
        (1000, 16, 0.2),  # no more than the larger read was found to take
        (3000, 16, 0.2),
        (4000, 16, 0.35),
        (50000, 99, 5.0),
    ],
)
def test_seconds_per_read(bytes_each, depth, expected):
    assert CURVE.seconds_per_read(bytes_each, depth=depth) == pytest.approx(expected)


def test_seconds_of_many_reads():
    assert CURVE.seconds(0, 1000) == 0
    assert CURVE.seconds(1, 1000) == 1.0
    assert CURVE.seconds(2, 1000) == 2.0  # two in flight: no better than one after the other
    assert CURVE.seconds(16, 1000) == pytest.approx(3.2)
    assert CURVE.seconds(160, 1000) == pytest.approx(32.0)
    assert CURVE.seconds(160, 1000, depth=1) == 160.0


@pytest.mark.parametrize("stalled", range(10))
def test_one_stalled_point_does_not_turn_decisions_round(stalled):
    """Whichever point of a probe took a hundred times as long: small reads at most three times as
    dear as they are, and never dearer than larger ones."""
    points = list(DEFAULT_CURVE.points)
    bad = points[stalled]
    points[stalled] = Point(bad.depth, bad.size_bytes, 100 * bad.seconds_per_read)
    curve = DeviceCurve("stalled", tuple(points))
    sizes = np.array([4096, 6144, 16384, 65536, 262144])
    n_ops = np.full(len(sizes), 500)
    found = curve.seconds_each(n_ops, sizes)
    true = DEFAULT_CURVE.seconds_each(n_ops, sizes)
    assert (np.diff(found) >= 0).all() and (found >= 0.999 * true).all()
    assert (found <= 4 * true).all()
    assert curve.sequential_bytes_per_s >= 0.8 * DEFAULT_CURVE.sequential_bytes_per_s


def test_rates():
    assert CURVE.bytes_per_s(1000) == 5000
    assert CURVE.sequential_bytes_per_s == 15000


def test_a_curve_without_the_asked_depth_uses_its_lowest():
    curve = DeviceCurve("deep", (Point(16, 1000, 0.5),))
    assert curve.seconds(1, 1000, depth=1) == 0.5


def test_the_default_has_every_point_that_a_probe_makes():
    from flashllm.probe.device import DEPTHS, SIZES

    assert [(p.depth, p.size_bytes) for p in DEFAULT_CURVE.points] == [
        (depth, size) for depth in DEPTHS for size in SIZES
    ]


def test_saved_and_loaded(tmp_path):
    for curve in (CURVE, DEFAULT_CURVE):
        curve.save(tmp_path / "curve.json")
        assert DeviceCurve.load(tmp_path / "curve.json") == curve


POINT = dict(depth=1, size_bytes=4096, seconds_per_read=0.1)
NOT_CURVES = {
    "not json": "{",
    "deep": "[" * 100_000,
    "a list": "[]",
    "no points": json.dumps(dict(name="x", points=[])),
    "unknown key": json.dumps(dict(name="x", points=[POINT], more=1)),
    "no name": json.dumps(dict(points=[POINT])),
    "name of a wrong kind": json.dumps(dict(name=3, points=[POINT])),
    "twice the same": json.dumps(dict(name="x", points=[POINT, POINT])),
    "unknown field": json.dumps(dict(name="x", points=[{**POINT, "y": 1}])),
    "free reads": json.dumps(dict(name="x", points=[{**POINT, "seconds_per_read": 0}])),
    "endless reads": json.dumps(dict(name="x", points=[{**POINT, "seconds_per_read": 1e999}])),
    "text": json.dumps(dict(name="x", points=[{**POINT, "seconds_per_read": "1"}])),
    "fraction": json.dumps(dict(name="x", points=[{**POINT, "size_bytes": 4096.5}])),
    "negative": json.dumps(dict(name="x", points=[{**POINT, "depth": -1}])),
    "huge": json.dumps(dict(name="x", points=[{**POINT, "size_bytes": 2**80}])),
}


@pytest.mark.parametrize("case", NOT_CURVES)
def test_refuses_a_file_that_is_no_curve(tmp_path, case):
    path = tmp_path / "curve.json"
    path.write_text(NOT_CURVES[case])
    with pytest.raises(FormatError, match="device curve"):
        DeviceCurve.load(path)


def test_a_missing_file_and_an_empty_curve(tmp_path):
    with pytest.raises(FlashReadError):
        DeviceCurve.load(tmp_path / "none.json")
    with pytest.raises(UsageError):
        DeviceCurve("empty", ())
