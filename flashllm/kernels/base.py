"""The contract of a kernel set: arithmetic on decoded frames in memory, and the one place where
shapes are checked.

A kernel set computes dots, weighted sums of rows, norms, rope, attention, activations, and RWKV's
recurrences (recurrent.py).  It refuses to know files, caches and models: a plane is a table of
frame addresses and a PieceView.

What stays true:
- The order of every sum is the one in docs/ARITHMETIC.md.  A result depends on its inputs and the
  set alone: not on the number of tokens in the call, on threads, on which frames lie where, on
  range or ids, or on how items are divided into calls.
- All arrays are C-contiguous NumPy arrays of the stated dtype; T is the number of tokens.  Wrong
  shapes and dtypes raise UsageError before anything is touched; outputs may not overlap inputs
  unless it says so (rms_norm, layer_norm and activate may write over `x`, `pre` or `up`).
- `addresses` is uint64 [n_frames]: the address of each decoded frame, a multiple of 16, or 0 where
  it is absent.  The caller keeps the memory alive (holds the lease) during the call.  Touching an
  absent frame, an id outside the plane or ids that do not ascend is KernelError: our own mistake,
  found without reading address 0; outputs are then undefined.
- Nothing is allocated per call: `activations` and `attention_scratch` are made once and counted.
- The lock of the interpreter is released during native calls.  One set may serve several threads as
  long as they do not share Activations, attention or outputs; their calls queue for the pool.
  After a fork the child computes on the calling thread, to the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from ..errors import ClosedError, UnknownNameError, UsageError
from ..quant import BY_CODE, GROUP, WEIGHT_TYPES
from ..units import align_up
from .checks import ACTIVATIONS, check_array, check_width
from .fused import FusedOperators
from .recurrent import RecurrentOperators

MAX_HEAD_DIM = 576
MAX_PLANES = 6  # bits of a low-bit row's column

# What a caller is about, so that a set can say where its time went: everything before an FFN;
# finding out which bundles are needed (deciding matrices, routers, predictors); the FFN; the head.
PHASES = ("attention", "predict", "ffn", "head")
ATTENTION, PREDICT, FFN, HEAD = range(len(PHASES))


@dataclass(frozen=True)
class PieceView:
    """Where one piece of every item of a plane lies inside decoded frames.

    weight_type  code of a WeightType
    per_frame    items in a frame; item i lies in frame i // per_frame
    stride       bytes from item to item in a frame, a multiple of 16
    offset       bytes from the item's start to the piece, a multiple of 16
    n_cols       values in the piece
    """

    weight_type: int
    per_frame: int
    stride: int
    offset: int
    n_cols: int

    def __post_init__(self) -> None:
        if self.weight_type not in BY_CODE:
            raise UnknownNameError("weight type code", self.weight_type, [str(c) for c in BY_CODE])
        ends = self.offset + BY_CODE[self.weight_type].row_bytes(max(self.n_cols, 1))
        if (
            min(self.per_frame, self.n_cols) < 1
            or self.offset < 0
            or self.stride % 16
            or self.offset % 16
            or ends > self.stride
        ):
            raise UsageError(f"{self} is not a piece: it ends at byte {ends} of its item")

    @classmethod
    def of_rows(cls, weight_type: str, n_rows: int, n_cols: int) -> PieceView:
        """`n_rows` rows one after another in one frame, each at a multiple of 16 bytes."""
        kind = WEIGHT_TYPES[weight_type]
        return cls(kind.code, n_rows, align_up(kind.row_bytes(n_cols), 16), 0, n_cols)

    @cached_property
    def quantised(self) -> bool:
        """Whether dots with this piece use int8 activations."""
        return BY_CODE[self.weight_type].group_size > 1

    def alike(self, other: PieceView) -> bool:
        """Whether dots with both are one kernel's."""
        return (self.weight_type, self.n_cols) == (other.weight_type, other.n_cols)

    @cached_property
    def ints(self) -> tuple[int, int, int, int, int]:
        """The five numbers in the order of fl_piece."""
        return (self.weight_type, self.per_frame, self.stride, self.offset, self.n_cols)


def weight_code(name: str) -> int:
    """The code of the weight type called `name`, for a PieceView."""
    return WEIGHT_TYPES[name].code


def low_bit_row_bytes(n_cols: int, n_planes: int) -> int:
    """Bytes of one row of bits: whole words of 64 columns, plane after plane."""
    return n_planes * (align_up(n_cols, 64) // 8)


class Activations:
    """Preallocated room for the activations of up to `max_tokens` tokens of `max_cols` columns.

    `prepare` fills it; it is valid until the next `prepare`, and refers to the x it was given.
    Behind q there is room for whole blocks of `many` tokens once more, in the order in which a set
    takes them.
    """

    def __init__(self, max_tokens: int, max_cols: int, many: int = 0):
        self.max_tokens, self.max_cols = max_tokens, max_cols
        _, scale_stride = self.strides(max_cols)
        scale_bytes = 4 * max_tokens * scale_stride
        n_bytes = self.bytes_needed(max_tokens, max_cols, many)
        self.q = np.zeros(n_bytes - scale_bytes, dtype=np.uint8)
        self.scales = np.zeros(max_tokens * scale_stride, dtype=np.float32)
        self.x: np.ndarray | None = None
        self.quantised = False

    @staticmethod
    @cache  # of the few widths that a model has
    def strides(n_cols: int) -> tuple[int, int]:
        """(bytes of q, number of scales) per token: whole vectors of any set may be read."""
        return align_up(n_cols, 64), align_up(-(-n_cols // GROUP), 16)

    @classmethod
    def bytes_needed(cls, max_tokens: int, max_cols: int, many: int = 0) -> int:
        """Bytes of Activations(max_tokens, max_cols, many)."""
        q_stride, scale_stride = cls.strides(max_cols)
        again = max_tokens // many * many if many else 0
        return (max_tokens + again) * (q_stride + 4 * scale_stride) + (64 if again else 0)

    @property
    def n_bytes(self) -> int:
        return self.q.nbytes + self.scales.nbytes


class NoClock:
    """The clock of a set that is Python itself and times nothing."""

    phase = ATTENTION

    def spent(self) -> tuple[int, ...]:
        return (0,) * len(PHASES)

    def credit(self, ns: int) -> None:
        """Dropped: where operators are Python, so is everything."""


@dataclass
class Recorded:
    """What was recorded: `calls` for `repeat`, or None where something cannot be repeated."""

    calls: Any = None


class KernelSet(FusedOperators, RecurrentOperators, ABC):
    """One set; see the module's text.  Public methods check and delegate to `_` methods.

    Callers say what they are about by `clock.phase = FFN` (a constant above, default ATTENTION);
    `clock.spent()` has the nanoseconds inside native operators so far, by phase; `clock.credit(ns)`
    adds to the phase what was spent outside of them and belongs to it.
    """

    name: str
    n_threads: int
    clock: Any
    closed = False
    many = 0  # tokens of a block that dots take at once; 0: none

    # ------------------------------------------------------------------------- scratch, lifetime

    def activations(self, max_tokens: int, max_cols: int) -> Activations:
        """Room for `prepare`; its bytes are `.n_bytes` == `activation_bytes(...)`."""
        return Activations(max_tokens, max_cols, self.many)

    def activation_bytes(self, max_tokens: int, max_cols: int) -> int:
        """Bytes of `activations(max_tokens, max_cols)`."""
        return Activations.bytes_needed(max_tokens, max_cols, self.many)

    def attention_bytes(self, n_context: int) -> int:
        """Bytes that attention_scratch(n_context) will hold."""
        return 0

    @abstractmethod
    def attention_scratch(self, n_context: int) -> int:
        """Make room for `attention` over up to `n_context` keys; returns the bytes now held.

        To be called before the first `attention`; never shrinks.
        """

    def close(self) -> None:
        """Stop the threads.  Idempotent; later calls of operators raise ClosedError."""
        self.closed = True

    def _open(self) -> None:
        if self.closed:
            raise ClosedError(f"kernel set {self.name} is closed")

    adds_arriving = False  # whether add_decided takes `arriving`

    # ---------------------------------------------------------------------------------- recording

    @contextmanager
    def recording(self) -> Iterator[Recorded]:
        """Operators called inside are made as ever, and kept to be repeated without the
        interpreter.  Only what operators do is kept; arrays must stay where they are, and so must
        a KV cache, which is not kept alive.  A set that cannot record leaves `calls` None, and so
        does an operator that cannot be repeated: whatever depends on more than the position.
        """
        yield Recorded()

    def repeat(self, calls: Any, position: int) -> None:
        """Make recorded calls again, on what their arrays hold now, for the token at `position`."""
        raise AssertionError(f"kernel set {self.name} records nothing")

    def repeat_arriving(self, calls: Any, arriving: Any) -> None:
        """Make a recorded call of `add_decided`, the only one, for what `arriving` brings: of the
        ids that were given to it, on what they hold now, as many as are brought, at most all."""
        raise AssertionError(f"kernel set {self.name} records nothing")

    # --------------------------------------------------------------------------------------- dots

    def prepare(self, acts: Activations, x: np.ndarray, piece: PieceView) -> None:
        """Make float32 `x` [T, piece.n_cols] ready for dots with pieces of this kind and width.

        int8 and int4 pieces share one preparation, and so do the three float types.
        """
        self._take(acts, x, piece)
        if piece.quantised:
            self._prepare(acts)

    def prepared(self, acts: Activations, x: np.ndarray, piece: PieceView) -> None:
        """Say that repeated calls have made `x` ready: dots of `acts` are with this x from now on,
        as after `prepare`."""
        self._take(acts, x, piece)

    def dot_range(
        self,
        acts: Activations,
        addresses: np.ndarray,
        piece: PieceView,
        start: int,
        stop: int,
        out: np.ndarray,
    ) -> None:
        """out[t, start:stop] = dot(item i's piece, x_t); out float32 [T, N >= stop]."""
        x = self._check_dot(acts, addresses, piece, out)
        self._check_range(addresses, piece, start, stop)
        check_width("out", out, stop)
        if stop > start:
            self._dot(acts, x, addresses, piece, None, start, stop - start, out)

    def dot_ids(
        self,
        acts: Activations,
        addresses: np.ndarray,
        piece: PieceView,
        ids: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """out[t, k] = dot(piece of item ids[k], x_t); ids int32 ascending, out [T, >= n]."""
        x = self._check_dot(acts, addresses, piece, out)
        check_array("ids", ids, np.int32, (None,))
        check_width("out", out, len(ids))
        if len(ids):
            self._dot(acts, x, addresses, piece, ids, 0, len(ids), out)

    def low_bit(
        self, acts: Activations, rows: np.ndarray, n_planes: int, out: np.ndarray
    ) -> None:
        """out[r] = dot(levels of row r, x) for one token prepared for an integer piece.

        rows  uint8 [n, low_bit_row_bytes(n_cols, n_planes)]: planes of bits, the lowest first; bit
              c % 8 of a plane's byte c // 8 is column c's.  The levels are the odd numbers
              2 * code - (2^n_planes - 1).
        out   float32 [n]
        """
        self._open()
        x = acts.x
        if x is None or not acts.quantised or len(x) != 1:
            raise UsageError("activations were not prepared for rows of bits")
        if not 1 <= n_planes <= MAX_PLANES:
            raise UsageError(f"rows of bits have 1 to {MAX_PLANES} planes, not {n_planes}")
        row_bytes = low_bit_row_bytes(x.shape[1], n_planes)
        check_array("rows", rows, np.uint8, (None, row_bytes))
        check_array("out", out, np.float32, (len(rows),), out=True)
        if len(rows):
            self._low_bit(acts, x, rows, n_planes, out)

    # --------------------------------------------------------------------------------- accumulate

    def accumulate_range(
        self,
        coef: np.ndarray,
        addresses: np.ndarray,
        piece: PieceView,
        start: int,
        stop: int,
        y: np.ndarray,
    ) -> None:
        """y[t, :n_cols] += sum over ascending i of coef[t, i - start] * item i's piece.

        coef float32 [T, >= stop - start], y float32 [T, >= n_cols].
        """
        self._check_accumulate(coef, addresses, piece, y)
        self._check_range(addresses, piece, start, stop)
        check_width("coef", coef, stop - start)
        if stop > start:
            self._accumulate(coef, addresses, piece, None, start, stop - start, y)

    def accumulate_ids(
        self,
        coef: np.ndarray,
        addresses: np.ndarray,
        piece: PieceView,
        ids: np.ndarray,
        y: np.ndarray,
    ) -> None:
        """y[t, :n_cols] += sum over k of coef[t, k] * piece of item ids[k]; ids ascending."""
        self._check_accumulate(coef, addresses, piece, y)
        check_array("ids", ids, np.int32, (None,))
        check_width("coef", coef, len(ids))
        if len(ids):
            self._accumulate(coef, addresses, piece, ids, 0, len(ids), y)

    def decode_rows(
        self, addresses: np.ndarray, piece: PieceView, ids: np.ndarray, out: np.ndarray
    ) -> None:
        """out[k] = the values of item ids[k]; ids int32 in any order, out float32 [n, n_cols]."""
        self._open()
        check_array("addresses", addresses, np.uint64, (None,))
        check_array("ids", ids, np.int32, (None,))
        check_array("out", out, np.float32, (len(ids), piece.n_cols), out=True)
        if len(ids):
            self._decode_rows(addresses, piece, ids, out)

    # ------------------------------------------------------------------------- norms, elementwise

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
        """out = x / sqrt(mean(x²) + eps) * weight, row by row of x [R, n]; out may be x.

        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
        """
        self._check_norm(x, out, weight=weight)
        if len(x):
            self._rms_norm(x, weight, eps, out)

    def layer_norm(
        self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, out: np.ndarray
    ) -> None:
        """out = (x - mean) / sqrt(var + eps) * weight + bias, row by row of x; out may be x.

        Ba, Kiros and Hinton, "Layer Normalization", 2016.
        """
        self._check_norm(x, out, weight=weight, bias=bias)
        if len(x):
            self._layer_norm(x, weight, bias, eps, out)

    def rope(self, x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> None:
        """Rotate x [T, n_heads, head_dim] in place, first half of `rot` columns with the second.

        cosines, sines float32 [T, rot / 2], rot <= head_dim; further columns stay.
        Su et al., "RoFormer", 2021, in the half-split layout of most checkpoints.
        """
        self._check_rope(x, cosines, sines)
        if x.size and cosines.size:
            self._rope(x, cosines, sines)

    def activate(self, kind: str, pre: np.ndarray, up: np.ndarray | None, out: np.ndarray) -> None:
        """out = act(pre) * up, or act(pre) without `up`; all [T, n]; out may be pre or up.

        kind: silu, relu, relu2 (max(0, x)²), gelu (by erf), gelu_tanh.
        """
        self._open()
        if kind not in ACTIVATIONS:
            raise UnknownNameError("activation", kind, list(ACTIVATIONS))
        check_array("pre", pre, np.float32, (None, None))
        if up is not None:
            check_array("up", up, np.float32, pre.shape)
        check_array("out", out, np.float32, pre.shape, out=True)
        if pre.size:
            self._activate(kind, pre, up, out)

    def active_ids(self, pre: np.ndarray, out: np.ndarray) -> int:
        """Write the ascending ids i with any pre[t, i] > 0 into int32 `out`; return how many."""
        self._open()
        check_array("pre", pre, np.float32, (None, None))
        check_array("out", out, np.int32, (None,), out=True)
        if len(out) < pre.shape[1]:
            raise UsageError(f"out must hold {pre.shape[1]} ids, not {len(out)}")
        return self._active_ids(pre, out) if pre.size else 0

    # ---------------------------------------------------------------------------------- attention

    def attention(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        first_position: int,
        window: int,
        scale: float,
        out: np.ndarray,
        *,
        cap: float = 0.0,
    ) -> None:
        """Causal attention of T tokens at positions first_position, first_position + 1, …

        q      float32 [T, n_heads, head_dim]
        k, v   float32 or float16 [n_kv_heads, n_context, head_dim], the chunk's own keys included;
               head h reads KV head h // (n_heads / n_kv_heads)
        window keys a token sees, itself included; 0: all
        cap    soft cap: a scaled score s becomes cap * tanh(s / cap); 0: none
        out    float32 [T, n_heads * head_dim]
        Vaswani et al., 2017; grouped heads after Ainslie et al., 2023.
        """
        self._check_attention(q, k, v, first_position, window, scale, cap, out)
        if len(q):
            self._attention(q, k, v, first_position, window, scale, cap, out)

    # ------------------------------------------------------------------------------ shared checks

    def _take(self, acts: Activations, x: np.ndarray, piece: PieceView) -> None:
        self._open()
        check_array("x", x, np.float32, (None, piece.n_cols))
        if not 1 <= x.shape[0] <= acts.max_tokens or x.shape[1] > acts.max_cols:
            raise UsageError(
                f"x {list(x.shape)} does not fit activations of {acts.max_tokens} tokens "
                f"x {acts.max_cols} columns"
            )
        acts.x, acts.quantised = x, piece.quantised

    def _check_range(self, addresses: np.ndarray, piece: PieceView, start: int, stop: int) -> None:
        room = len(addresses) * piece.per_frame
        if not 0 <= start <= stop <= room:
            raise UsageError(f"items {start}..{stop} are not in the plane's 0..{room}")

    def _check_dot(
        self, acts: Activations, addresses: np.ndarray, piece: PieceView, out: np.ndarray
    ) -> np.ndarray:
        self._open()
        x = acts.x
        if x is None or acts.quantised != piece.quantised or x.shape[1] != piece.n_cols:
            raise UsageError(f"activations were not prepared for {piece}")
        check_array("addresses", addresses, np.uint64, (None,))
        check_array("out", out, np.float32, (x.shape[0], None), out=True)
        return x

    def _check_accumulate(
        self, coef: np.ndarray, addresses: np.ndarray, piece: PieceView, y: np.ndarray
    ) -> None:
        self._open()
        check_array("coef", coef, np.float32, (None, None))
        check_array("addresses", addresses, np.uint64, (None,))
        check_array("y", y, np.float32, (coef.shape[0], None), out=True)
        check_width("y", y, piece.n_cols)
        if len(coef) < 1:
            raise UsageError("coef has no tokens")

    def _check_rope(self, x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> None:
        self._open()
        check_array("x", x, np.float32, (None, None, None), out=True)
        check_array("cosines", cosines, np.float32, (x.shape[0], None))
        check_array("sines", sines, np.float32, cosines.shape)
        if 2 * cosines.shape[1] > x.shape[2]:
            raise UsageError(f"rope of {2 * cosines.shape[1]} columns, heads have {x.shape[2]}")

    def _check_attention(self, q, k, v, first_position, window, scale, cap, out) -> None:
        self._open()
        check_array("q", q, np.float32, (None, None, None))
        n_tokens, n_heads, head_dim = q.shape
        kv_dtype = np.float16 if getattr(k, "dtype", None) == np.float16 else np.float32
        check_array("k", k, kv_dtype, (None, None, head_dim))
        check_array("v", v, kv_dtype, k.shape)
        check_array("out", out, np.float32, (n_tokens, n_heads * head_dim), out=True)
        n_kv_heads, n_context = k.shape[:2]
        if n_kv_heads < 1 or n_heads < 1 or n_heads % n_kv_heads:
            raise UsageError(f"{n_heads} heads cannot share {n_kv_heads} KV heads")
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            raise UsageError(f"head_dim {head_dim} is not in 1..{MAX_HEAD_DIM}")
        if first_position < 0 or first_position + n_tokens > n_context:
            raise UsageError(
                f"positions {first_position}..{first_position + n_tokens - 1} "
                f"are outside the {n_context} of the KV arrays"
            )
        if window < 0 or not 0 < scale < float("inf"):
            raise UsageError(f"window {window} or scale {scale} is out of range")
        if not 0 <= cap < float("inf"):
            raise UsageError(f"cap {cap} is out of range")

    def _check_norm(self, x: np.ndarray, out: np.ndarray, **vectors: np.ndarray) -> None:
        self._open()
        check_array("x", x, np.float32, (None, None))
        if x.shape[1] < 1:
            raise UsageError("x has no columns")
        check_array("out", out, np.float32, x.shape, out=True)
        for name, vector in vectors.items():
            check_array(name, vector, np.float32, (x.shape[1],))

    # ---------------------------------------------------------------------- what a set implements

    @abstractmethod
    def _prepare(self, acts: Activations) -> None: ...

    @abstractmethod
    def _dot(self, acts, x, addresses, piece, ids, start, n, out) -> None: ...

    @abstractmethod
    def _low_bit(self, acts, x, rows, n_planes, out) -> None: ...

    @abstractmethod
    def _accumulate(self, coef, addresses, piece, ids, start, n, y) -> None: ...

    @abstractmethod
    def _decode_rows(self, addresses, piece, ids, out) -> None: ...

    @abstractmethod
    def _rms_norm(self, x, weight, eps, out) -> None: ...

    @abstractmethod
    def _layer_norm(self, x, weight, bias, eps, out) -> None: ...

    @abstractmethod
    def _rope(self, x, cosines, sines) -> None: ...

    @abstractmethod
    def _attention(self, q, k, v, first_position, window, scale, cap, out) -> None: ...

    @abstractmethod
    def _activate(self, kind, pre, up, out) -> None: ...

    @abstractmethod
    def _active_ids(self, pre, out) -> int: ...
