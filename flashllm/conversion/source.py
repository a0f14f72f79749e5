"""Items of a plane, out of a checkpoint, a block at a time.

`ItemSource` gives blocks of encoded items (uint8 [k, stride]) for any plan; it holds one block, one
transposed matrix (or its scratch file) and nothing else.  Values whose type does not change are
copied bit by bit; everything else goes through float32 and the weight type's encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..checkpoints import Checkpoint, widen
from ..container.base import Piece
from ..errors import CheckpointError, WeightValueError
from ..models.base import TensorRole
from ..quant import WEIGHT_TYPES
from .layout import PlanePlan
from .transpose import Columns

BLOCK_BYTES = 8 * 2**20  # of source values; encoders take up to five times as much in passing
COLUMNS_IN_MEMORY_BYTES = 24 * 2**20
_ENCODE_VALUES = 2**19  # per call of an encoder, whose float32 temporaries are many


class ItemSource:
    """Reads what `plan` needs; `order` (int64[n_items], bundles and their deciding rows) says which
    neuron of the checkpoint comes at each place."""

    def __init__(
        self, checkpoint: Checkpoint, plan: PlanePlan, *, folder: Path, order: np.ndarray | None
    ):
        self._checkpoint, self._plan, self._folder, self._order = checkpoint, plan, folder, order

    def blocks(self) -> Iterator[np.ndarray]:
        """All items in order, uint8 [k, stride], gaps between pieces zero."""
        done = 0
        for group in self._plan.role.groups():
            yield from self._group(group, self._plan.tensors[done : done + len(group)])
            done += len(group)

    def sample(self, n_items: int) -> np.ndarray:
        """The first `n_items` items of the first tensor, for measuring codecs."""
        shape = self._plan.shape
        found = []
        for k, (_, tensor) in enumerate(self._plan.role.tensors[: len(shape.pieces)]):
            name, n = self._plan.tensors[k], min(n_items, tensor.n_items)
            found.append((shape.pieces[k], self._sample(tensor, name, n), name))
        return self._items(
            [(p, stored, self._checkpoint.dtype(name), name) for p, stored, name in found]
        )

    def _sample(self, tensor: TensorRole, name: str, n_items: int) -> np.ndarray:
        if not tensor.transposed:
            return self._checkpoint.stored_rows(name, 0, n_items)
        direct = self._checkpoint.columns(name, 0, n_items)
        if direct is not None:
            return direct
        # As many values of the same matrix in another order: good enough for an entropy.
        n_rows, n_cols = self._checkpoint.shape(name)
        rows = self._checkpoint.stored_rows(name, 0, min(n_rows, -(-n_items * n_rows // n_cols)))
        return np.resize(rows, (n_items, n_rows))

    def _ranges(self, n_items: int, item_bytes: int) -> Iterator[tuple[int, int]]:
        step = max(1, BLOCK_BYTES // item_bytes)
        for start in range(0, n_items, step):
            yield start, min(start + step, n_items)

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if self._order is None:
            return self._checkpoint.stored_rows(name, start, stop)
        return gather(
            lambda a, b: self._checkpoint.stored_rows(name, a, b), self._order[start:stop]
        )

    def _group(
        self, group: tuple[tuple[str, TensorRole], ...], names: tuple[str, ...]
    ) -> Iterator[np.ndarray]:
        """A part's rows; the bundles of a layer, or of one of its experts."""
        columns = {}
        try:
            for (_, tensor), name in zip(group, names, strict=True):
                if tensor.transposed:
                    columns[name] = Columns(
                        self._checkpoint,
                        name,
                        memory_bytes=COLUMNS_IN_MEMORY_BYTES,
                        folder=self._folder,
                    )
            item_bytes = sum(tensor.n_cols * 4 for _, tensor in group)
            for start, stop in self._ranges(group[0][1].n_items, item_bytes):
                parts = []
                for piece, name in zip(self._plan.shape.pieces, names, strict=True):
                    stored = self._piece_rows(columns.get(name), name, start, stop)
                    parts.append((piece, stored, self._checkpoint.dtype(name), name))
                yield self._items(parts)
        finally:
            for reader in columns.values():
                reader.close()

    def _piece_rows(self, columns: Columns | None, name: str, start: int, stop: int) -> np.ndarray:
        if columns is None:
            return self._rows(name, start, stop)
        if self._order is None:
            return columns.read(start, stop)
        return gather(columns.read, self._order[start:stop])

    def _items(self, parts: list[tuple[Piece, np.ndarray, str, str]]) -> np.ndarray:
        items = np.zeros((len(parts[0][1]), self._plan.shape.stride), np.uint8)
        for piece, stored, dtype, name in parts:
            self._encode(piece, stored, dtype, name, items)
        return items

    def _encode(
        self, piece: Piece, stored: np.ndarray, dtype: str, name: str, items: np.ndarray
    ) -> None:
        end = piece.offset + piece.row_bytes
        same = dtype == piece.weight_type
        encoder = WEIGHT_TYPES[piece.weight_type]
        step = max(1, _ENCODE_VALUES // max(1, piece.n_cols))
        for start in range(0, len(stored), step):
            block = stored[start : start + step]
            try:
                if same and is_finite(block, dtype):
                    raw = np.ascontiguousarray(block).view(np.uint8)
                else:
                    raw = encoder.encode(widen(block, dtype))
            except WeightValueError as problem:
                raise CheckpointError(
                    self._checkpoint.path, f"tensor {name!r}", "weights that can be held", problem
                ) from None
            items[start : start + step, piece.offset : end] = raw


def is_finite(stored: np.ndarray, dtype: str) -> bool:
    """Whether no value of an array in storage dtype is infinite or NaN."""
    if dtype == "bf16":
        return not ((stored & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(stored).all())


def gather(read, ids: np.ndarray) -> np.ndarray:
    """Rows `ids` through `read(start, stop)`, neighbouring ids in one read."""
    ascending = np.sort(ids)
    breaks = np.flatnonzero(np.diff(ascending) != 1) + 1
    runs = [read(int(run[0]), int(run[-1]) + 1) for run in np.split(ascending, breaks)]
    rows = np.concatenate(runs)
    return rows[np.searchsorted(ascending, ids)]
