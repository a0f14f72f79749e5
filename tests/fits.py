"""Small .fit files with known contents."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flashllm.calibration.fit_writer import FitWriter
from flashllm.calibration.sections import (
    BitRows,
    low_bit_form,
    low_bit_section,
    low_rank_section,
    pack_planes,
)
from flashllm.container import open_container
from flashllm.predictors.fit import fit_path
from flashllm.predictors.header import Header
from flashllm.predictors.scores import FittedLayer

N, HIDDEN = 37, 16
MODEL, TEXT = "ab" * 32, "cd" * 32
RECALLS = (0.9, 0.99)


def layer(number, kind, form, *, unit=1, n=N):
    return FittedLayer(
        layer=number, kind=kind, n_bundles=n, hidden_size=HIDDEN, unit=unit, form=form,
        thresholds=(0.5, -0.5), recall=(0.9, 0.99), precision=(0.5, 0.25),
    )  # fmt: skip


def low_rank(number=1, *, rank=5, unit=1, weight_type="int8", seed=0):
    """(layer, section, A, B, bias)"""
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((rank, HIDDEN)), random.standard_normal((N, rank))
    bias = random.standard_normal(N)
    made = layer(number, "low_rank", {"rank": rank, "weight_type": weight_type}, unit=unit)
    return made, low_rank_section(a, b, bias, weight_type), a, b, bias


def low_bit(number=2, *, unit=1, seed=0):
    """(layer, section, parts): rows of 1, 2 and 4 bits; some bundles have none."""
    random = np.random.default_rng(seed)
    order, parts, at = random.permutation(N), [], 0
    for planes, count in ((1, 9), (2, 12), (4, 8)):
        parts.append(BitRows(
            planes, np.sort(order[at : at + count]),
            pack_planes(random.integers(0, 2**planes, (count, HIDDEN)).astype(np.uint8), planes),
            random.uniform(0.1, 1, count) / 2**planes, random.standard_normal(count),
        ))  # fmt: skip
        at += count
    made = layer(number, "low_bit", low_bit_form(parts), unit=unit)
    return made, low_bit_section(N, parts), parts


def write(path: Path, *made) -> Path:
    """A fit of (layer, section, …) tuples; default: one of each kind."""
    made = made or (low_rank(), low_bit())
    with FitWriter(path) as writer:
        numbers = [writer.add(one[0], one[1]) for one in made]
        writer.commit(Header(
            model=MODEL, hidden_size=HIDDEN, text=TEXT, text_name="t", n_tokens=100,
            recalls=RECALLS, layers=tuple(one[0] for one in made),
        ), numbers)  # fmt: skip
    return path


def beside(path: str, model: str | None = None) -> int:
    """Random low-rank predictors of every layer beside a container; how many.  `model`: the digest
    of the container that they say they are of."""
    with open_container(path) as container:
        digest, config = model or container.digest, container.config
    rng, made = np.random.default_rng(3), []
    n, hidden = config["intermediate_size"], config["hidden_size"]
    for number in range(config["n_layers"]):
        section = low_rank_section(
            rng.standard_normal((4, hidden)), rng.standard_normal((n, 4)), np.zeros(n), "int8"
        )
        made.append((FittedLayer(
            layer=number, kind="low_rank", n_bundles=n, hidden_size=hidden, unit=1,
            form={"rank": 4, "weight_type": "int8"}, thresholds=(1.0, -1.0), recall=(0.5, 0.9),
            precision=(0.5, 0.4),
        ), section))  # fmt: skip
    with FitWriter(fit_path(path)) as writer:
        numbers = [writer.add(one, section) for one, section in made]
        writer.commit(Header(
            model=digest, hidden_size=hidden, text=TEXT, text_name="t", n_tokens=100,
            recalls=(0.5, 0.9), layers=tuple(one for one, _ in made),
        ), numbers)  # fmt: skip
    return len(made)
