"""Predictors fitted to a container, for the same neurons in another order.

    python bench/carry_fit.py FITTED.flash CONTAINER.flash    # writes CONTAINER.flash.fit

A fit names bundles by their place, so that a container in another order needs another; fitting a
layer of 15360 neurons takes a minute.  Nothing is fitted here: neurons of both containers are
matched by their bytes, rows move, and the columns of a low rank's B, which are in groups of 32 with
one scale, are rounded once more (to the same type).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from flashllm.calibration.fit_writer import FitWriter
from flashllm.container import Container, open_container
from flashllm.conversion.from_container import PlaneReader
from flashllm.kernels.base import low_bit_row_bytes
from flashllm.predictors.fit import fit_path, open_fit
from flashllm.predictors.low_bit import LowBitPredictor
from flashllm.predictors.low_rank import LowRankPredictor
from flashllm.predictors.scores import FittedLayer
from flashllm.quant import WEIGHT_TYPES

KEY_BYTES = 64  # of a bundle; that whole bundles agree is checked

def carry(fitted: Path, container: Path) -> None:
    """Both have all pieces of a neuron in its bundle, which no two neurons have alike."""
    old, raw = open_fit(fit_path(fitted)), fit_path(fitted).read_bytes()
    with (
        open_container(fitted) as before,
        open_container(container) as after,
        FitWriter(fit_path(container)) as writer,
    ):
        old.require(before.digest)
        numbers = []
        for layer in old.layers:
            order = order_between(before, after, f"layers.{layer.layer}.ffn")
            section = np.frombuffer(raw, np.uint8, layer.n_bytes, layer.offset)
            moved = _low_rank if layer.kind == LowRankPredictor.name else _low_bit
            numbers.append(writer.add(layer, moved(layer, section, order)))
        writer.commit(replace(old.header, model=after.digest), numbers)


def order_between(before: Container, after: Container, plane: str) -> np.ndarray:
    """int64: which item of `before` lies at each place of `after`."""
    places = []
    for container in (before, after):
        shape = container.planes[plane]
        items = PlaneReader(shape, container).whole(0, shape.n_items)
        keys = np.ascontiguousarray(items[:, :KEY_BYTES]).view(f"V{KEY_BYTES}").ravel()
        at = np.argsort(keys, kind="stable")
        places.append((at, items[at]))
    (old, old_items), (new, new_items) = places
    if not np.array_equal(old_items, new_items):
        raise SystemExit(f"{plane}: {before.path} and {after.path} are not the same neurons")
    order = np.empty(len(new), np.int64)
    order[new] = old
    return order


def _low_rank(layer: FittedLayer, section: np.ndarray, order: np.ndarray) -> bytes:
    a, b = LowRankPredictor.pieces(layer)
    start, stop = a.per_frame * a.stride, LowRankPredictor.weight_bytes(layer)
    kind, rank = WEIGHT_TYPES[layer.form["weight_type"]], layer.form["rank"]
    rows = section[start:stop].reshape(rank, b.stride)
    width = kind.row_bytes(layer.n_bundles)
    values = kind.decode(np.ascontiguousarray(rows[:, :width]), layer.n_bundles)
    turned = np.zeros_like(rows)
    turned[:, :width] = kind.encode(np.ascontiguousarray(values[:, order]))
    bias = section[stop : stop + 4 * layer.n_bundles].view("<f4")[order]
    return section[:start].tobytes() + turned.tobytes() + bias.tobytes()


def _low_bit(layer: FittedLayer, section: np.ndarray, order: np.ndarray) -> bytes:
    counts, n = layer.form["rows"], sum(layer.form["rows"])
    place = np.empty(layer.n_bundles, np.int64)
    place[order] = np.arange(layer.n_bundles)
    end = LowBitPredictor.weight_bytes(layer)
    id_type = LowBitPredictor.id_type(layer.n_bundles)
    scale, bias = section[end : end + 8 * n].view("<f4").reshape(2, n)
    ids = place[section[end + 8 * n :][: n * id_type.itemsize].view(id_type)]
    turned, at, row = [], 0, 0
    by_place = np.empty(n, np.int64)
    for planes, count in enumerate(counts, start=1):
        width = low_bit_row_bytes(layer.hidden_size, planes)
        now = np.argsort(ids[row : row + count])
        turned.append(section[at : at + count * width].reshape(count, width)[now].tobytes())
        by_place[row : row + count] = row + now
        at, row = at + count * width, row + count
    rest = (scale[by_place], bias[by_place], ids[by_place].astype(id_type))
    return b"".join(turned) + b"".join(part.tobytes() for part in rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fitted", type=Path, help="the container beside which the fit lies")
    parser.add_argument("container", type=Path, help="the same neurons in another order")
    args = parser.parse_args()
    carry(args.fitted, args.container)
    print(fit_path(args.container))


if __name__ == "__main__":
    main()
