"""The contract of a kernel set's fused operators: several of base.py's in one call.

Part of KernelSet (base.py), whose text holds here too.  Each has the bits of the operators that it
names, called one after the other, and is made of them where a set has no shorter way: a set's own
way is held to that.  Between two operators of a layer the interpreter finds its code and objects
pushed out of the cache by weights, some 30 us for a line that takes 2 (measured, 1.1 B); what a
token takes is therefore counted in calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import KernelError, UnknownNameError, UsageError
from .checks import ACTIVATIONS, check_array, check_width

if TYPE_CHECKING:
    from .base import Activations, PieceView


class FusedOperators:
    """The fused part of a kernel set."""

    def linear(
        self,
        acts: Activations,
        x: np.ndarray,
        addresses: np.ndarray,
        piece: PieceView,
        start: int,
        stop: int,
        out: np.ndarray,
    ) -> None:
        """prepare(acts, x, piece), then dot_range(acts, addresses, piece, start, stop, out)."""
        self._take(acts, x, piece)
        self._check_dot(acts, addresses, piece, out)
        self._check_range(addresses, piece, start, stop)
        check_width("out", out, stop)
        if stop > start:
            self._linear(acts, addresses, piece, start, stop - start, out)

    def _linear(self, acts, addresses, piece, start, n, out) -> None:
        if acts.quantised:
            self._prepare(acts)
        self._dot(acts, acts.x, addresses, piece, None, start, n, out)

    def clear(self, x: np.ndarray) -> None:
        """x = 0; x float32 [R, n]."""
        check_array("x", x, np.float32, (None, None), out=True)
        if x.size:
            self._clear(x)

    def _clear(self, x) -> None:
        x.fill(0.0)

    def add(self, x: np.ndarray, added: np.ndarray) -> None:
        """x += added; both float32 [R, n]."""
        check_array("x", x, np.float32, (None, None), out=True)
        check_array("added", added, np.float32, x.shape)
        if x.size:
            self._add(x, added)

    def _add(self, x, added) -> None:
        np.add(x, added, out=x)

    def scale(self, x: np.ndarray, factor: float) -> None:
        """x *= factor, which is rounded to float32; x float32 [R, n]."""
        check_array("x", x, np.float32, (None, None), out=True)
        if x.size:
            self._scale(x, np.float32(factor))

    def _scale(self, x, factor) -> None:
        np.multiply(x, factor, out=x)

    def add_rms_norm(
        self, x: np.ndarray, added: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray
    ) -> None:
        """x += added, in place, then rms_norm(x, weight, eps, out); x and added [R, n]."""
        self._check_norm(x, out, weight=weight)
        check_array("x", x, np.float32, (None, None), out=True)
        check_array("added", added, np.float32, x.shape)
        if len(x):
            self._add_rms_norm(x, added, weight, eps, out)

    def _add_rms_norm(self, x, added, weight, eps, out) -> None:
        self._add(x, added)
        self._rms_norm(x, weight, eps, out)

    def attend_token(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        rope: tuple[np.ndarray, np.ndarray],
        keys: np.ndarray,
        values: np.ndarray,
        position: int,
        window: int,
        scale: float,
        out: np.ndarray,
        *,
        cap: float = 0.0,
    ) -> None:
        """A token's step through a KV cache: rope of q and k, in place; k and v kept; attention.

        q            float32 [1, n_heads, head_dim]; k, v the same with n_kv_heads
        rope         cosines and sines of all positions, float32 [> position, rot / 2]
        keys, values float32 or float16 [n_kv_heads, n_context, head_dim]: k and v are written at
                     `position`, rounded to the nearest, and seen
        The others as in attention.
        """
        self._check_attention(q, keys, values, position, window, scale, cap, out)
        for name, array in zip(("cosines", "sines"), rope, strict=True):
            check_array(name, array, np.float32, (None, None))
            if len(array) <= position:
                raise UsageError(f"{name} has {len(array)} rows and none of position {position}")
        self._check_rope(q, *(array[position : position + 1] for array in rope))
        for name, array in (("k", k), ("v", v)):
            check_array(name, array, np.float32, (1, len(keys), q.shape[2]), out=array is k)
        for name, array in (("keys", keys), ("values", values)):
            check_array(name, array, array.dtype.type, array.shape, out=True)
        if len(q) != 1:
            raise UsageError(f"attend_token takes one token, not {len(q)}")
        self._attend_token(q, k, v, rope, keys, values, position, window, scale, cap, out)

    def _attend_token(
        self, q, k, v, rope, keys, values, position, window, scale, cap, out
    ) -> None:
        cosines, sines = (array[position : position + 1] for array in rope)
        if cosines.size:
            self._rope(q, cosines, sines)
            self._rope(k, cosines, sines)
        keys[:, position], values[:, position] = k[0], v[0]
        self._attention(q, keys, values, position, window, scale, cap, out)

    def add_neurons(
        self,
        acts: Activations,
        addresses: np.ndarray,
        pieces: tuple[PieceView | None, PieceView | None, PieceView],
        items: np.ndarray | range,
        kind: str,
        pre: np.ndarray,
        up: np.ndarray | None,
        y: np.ndarray,
    ) -> None:
        """y[0] += sum over items i, ascending, of act(first_i . x) * (second_i . x) * down_i.

        One token.  pieces = (first, second, down) of each bundle; without `first` float32
        pre [1, n] holds the pre-activations, without `second` there is no factor up.  `acts` is
        prepared for the pieces that are dotted.  items: int32 ids ascending, or a range of step 1.
        pre and up [1, n] are overwritten.  The bits are those of dot, activate and accumulate one
        after the other, which is how it is made where a set has no shorter way.
        """
        first, second, down = pieces
        self._check_accumulate(pre, addresses, down, y)
        if len(pre) != 1 or (up is None) != (second is None):
            raise UsageError("add_neurons takes one token, and room for up beside a second piece")
        if kind not in ACTIVATIONS:
            raise UnknownNameError("activation", kind, list(ACTIVATIONS))
        n = len(items)
        check_array("pre", pre, np.float32, (1, n), out=True)
        if up is not None:
            check_array("up", up, np.float32, (1, n), out=True)
        if isinstance(items, range):
            if items.step != 1:
                raise UsageError(f"a range of items has step 1, not {items.step}")
            self._check_range(addresses, down, items.start, max(items.start, items.stop))
        else:
            check_array("items", items, np.int32, (None,))
        for piece, out in ((first, pre), (second, up)):
            if piece is not None:
                self._check_dot(acts, addresses, piece, out)
        if n:
            self._neurons(acts, addresses, pieces, items, kind, pre, up, y)

    def _neurons(self, acts, addresses, pieces, items, kind, pre, up, y) -> None:
        first, second, down = pieces
        ids = items
        if isinstance(items, range):
            ids = np.arange(items.start, items.stop, dtype=np.int32)
        for piece, out in ((first, pre), (second, up)):
            if piece is not None:
                self._dot(acts, acts.x, addresses, piece, ids, 0, len(ids), out)
        self._activate(kind, pre, up, pre)
        self._accumulate(pre, addresses, down, ids, 0, len(ids), y)

    def above(
        self, values: np.ndarray, cut: np.ndarray | None, ids: np.ndarray, count: np.ndarray
    ) -> None:
        """The ids i, ascending, with values[0, i] > cut[i], or > 0 without a cut, to the front of
        int32 `ids`; how many into int64 count[0].  values float32 [1, n], cut float32 [n]."""
        self._open()
        check_array("values", values, np.float32, (1, None))
        check_array("ids", ids, np.int32, (None,), out=True)
        check_array("count", count, np.int64, (1,), out=True)
        n = values.shape[1]
        if cut is not None:
            check_array("cut", cut, np.float32, (n,))
        if len(ids) < n:
            raise UsageError(f"ids must have room for {n}, not {len(ids)}")
        count[0] = 0
        if n:
            self._above(values, cut, ids, count)

    def _above(self, values, cut, ids, count) -> None:
        found = np.flatnonzero(values[0] > (np.float32(0) if cut is None else cut))
        ids[: found.size], count[0] = found, found.size

    def add_decided(
        self,
        acts: Activations,
        addresses: np.ndarray,
        pieces: tuple[PieceView | None, PieceView | None, PieceView],
        ids: np.ndarray,
        kind: str,
        decided: np.ndarray,
        bias: np.ndarray | None,
        room: tuple[np.ndarray, np.ndarray | None, np.ndarray],
        y: np.ndarray,
        added: np.ndarray,
        *,
        count: np.ndarray | None = None,
        arriving: Any = None,
    ) -> None:
        """add_neurons of bundles `ids`, int32 ascending, by pre-activations decided[0, ids].

        pieces  (deciding, second, down).  With `deciding` the pre-activations are made first,
                deciding_i . x + bias[i] each, and only neurons above zero are added.
        decided float32 [1, n >= every id]; bias float32 of the same n, or None
        room    float32 [1, >= n ids] for factors; the same for the second piece's, None without;
                int32 [>= n ids]: overwritten
        added   int64 [1]: how many neurons were added
        count   int64 [1]: of `ids` only the first count[0], which `above` has found
        arriving  what brings the bundles (_core.Bring of these ids): parts are added as they come
        """
        deciding, second, down = pieces
        pre, up, active = room
        n = len(ids)
        self._check_accumulate(pre, addresses, down, y)
        check_array("ids", ids, np.int32, (None,))
        check_array("decided", decided, np.float32, (1, None), out=deciding is not None)
        check_array("active", active, np.int32, (None,), out=True)
        check_array("added", added, np.int64, (1,), out=True)
        if count is not None:
            check_array("count", count, np.int64, (1,))
        if bias is not None:
            check_array("bias", bias, np.float32, (decided.shape[1],))
        if (up is None) != (second is None):
            raise UsageError("room for the second piece's dots comes with the second piece")
        if kind not in ACTIVATIONS:
            raise UnknownNameError("activation", kind, list(ACTIVATIONS))
        for name, array in (("pre", pre), ("up", up)):
            if array is not None:
                check_array(name, array, np.float32, (1, None), out=True)
                check_width(name, array, n)
        if len(active) < n:
            raise UsageError(f"active must have room for {n} ids, not {len(active)}")
        for piece, out in ((deciding, pre), (second, up)):
            if piece is not None:
                self._check_dot(acts, addresses, piece, out)
        added[0] = 0
        if n:
            self._add_decided(
                acts, addresses, pieces, ids, count, kind, decided, bias, pre, up, active, y,
                added, arriving,
            )  # fmt: skip

    def _add_decided(
        self, acts, addresses, pieces, ids, count, kind, decided, bias, pre, up, active, y, added,
        arriving=None,
    ) -> None:  # fmt: skip
        if arriving is not None:
            raise AssertionError(f"kernel set {self.name} adds nothing as it arrives")
        deciding, second, down = pieces
        if count is not None:
            if not 0 <= count[0] <= len(ids):
                raise KernelError(f"{count[0]} of {len(ids)} ids")
            ids = ids[: int(count[0])]
        if not len(ids):
            return
        if (np.diff(ids) < 1).any() or ids[0] < 0 or ids[-1] >= decided.shape[1]:
            raise KernelError(f"ids must ascend strictly within 0 to {decided.shape[1] - 1}")
        if deciding is not None:
            dots = np.empty((1, len(ids)), np.float32)
            self._dot(acts, acts.x, addresses, deciding, ids, 0, len(ids), dots)
            decided[0, ids] = dots[0] if bias is None else dots[0] + bias[ids]
            ids = ids[decided[0, ids] > 0]
        added[0] = len(ids)
        if len(ids):
            factors = np.ascontiguousarray(decided[:, ids])
            ups = None if up is None else np.empty_like(factors)
            self._neurons(acts, addresses, (None, second, down), ids, kind, factors, ups, y)
