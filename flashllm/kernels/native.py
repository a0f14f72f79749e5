"""The compiled kernel sets: serial, avx2, avx512, neon.  One crossing into C per operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import UnsupportedError, UsageError
from .base import ACTIVATIONS, Activations, KernelSet, Recorded
from .recurrent import SHARES


def trouble(name: str) -> str | None:
    """None when set `name` runs on this machine, else the reason."""
    from .._core import kernel_set_trouble

    return kernel_set_trouble(name)


class NativeSet(KernelSet):
    """A table of C kernels and a pool of `n_threads` threads (the caller is one of them)."""

    def __init__(self, name: str, *, n_threads: int):
        from .._core import NativeKernels

        why = trouble(name)
        if why is not None:
            raise UnsupportedError(f"kernel set {name} does not run here: {why}")
        self.name, self.n_threads = name, n_threads
        self._core = NativeKernels(name, n_threads)
        self.clock, self.many = self._core.clock, self._core.many
        self._scratch = np.empty(0, dtype=np.float32)
        self._scratch_context = 0
        self._n_ids = np.zeros(1, dtype=np.int64)

    def close(self) -> None:
        super().close()
        self._core = None
        self._scratch = np.empty(0, dtype=np.float32)

    def attention_bytes(self, n_context: int) -> int:
        from .._core import attention_scratch_floats

        return 4 * self.n_threads * attention_scratch_floats(n_context)

    def attention_scratch(self, n_context: int) -> int:
        self._open()
        if n_context > self._scratch_context:
            self._scratch = np.zeros(self.attention_bytes(n_context) // 4, dtype=np.float32)
            self._scratch_context = n_context
        return self._scratch.nbytes

    def _prepare(self, acts: Activations) -> None:
        q_stride, scale_stride = acts.strides(acts.x.shape[1])
        self._core.prepare(acts.x, acts.q, q_stride, acts.scales, scale_stride)

    def _dot(self, acts, x, addresses, piece, ids, start, n, out) -> None:
        q_stride, scale_stride = acts.strides(piece.n_cols)
        column = 0 if ids is not None else start
        self._core.dot(
            x, acts.q, q_stride, acts.scales, scale_stride,
            piece.ints, addresses, ids, start, n, out, column,
        )  # fmt: skip

    def _low_bit(self, acts, x, rows, n_planes, out) -> None:
        q_stride, scale_stride = acts.strides(x.shape[1])
        self._core.low_bit(x, acts.q, q_stride, acts.scales, scale_stride, rows, n_planes, out)

    def _accumulate(self, coef, addresses, piece, ids, start, n, y) -> None:
        self._core.accumulate(coef, piece.ints, addresses, ids, start, n, y)

    def _neurons(self, acts, addresses, pieces, items, kind, pre, up, y) -> None:
        first, second, down = pieces
        if first is not None and second is not None and not first.alike(second):
            return super()._neurons(acts, addresses, pieces, items, kind, pre, up, y)
        dotted = first or second
        q_stride, scale_stride = acts.strides(dotted.n_cols) if dotted else (0, 0)
        ids, start = (None, items.start) if isinstance(items, range) else (items, 0)
        self._core.neurons(
            acts.x if dotted else None, acts.q, q_stride, acts.scales, scale_stride,
            first and first.ints, second and second.ints, down.ints,
            addresses, ids, start, len(items), ACTIVATIONS[kind], pre, up, y,
        )  # fmt: skip

    adds_arriving = True

    def _add_decided(
        self, acts, addresses, pieces, ids, count, kind, decided, bias, pre, up, active, y, added,
        arriving=None,
    ) -> None:  # fmt: skip
        deciding, second, down = pieces
        dotted = deciding or second
        q_stride, scale_stride = acts.strides(dotted.n_cols) if dotted else (0, 0)
        n = count
        if n is None:
            n = self._n_ids
            n[0] = len(ids)
        self._core.decided(
            acts.x if dotted else None, acts.q, q_stride, acts.scales, scale_stride,
            deciding and deciding.ints, second and second.ints, down.ints, addresses, ids, n,
            ACTIVATIONS[kind], decided, bias, pre, up, active, y, added, count is not None,
            arriving,
        )  # fmt: skip

    def _above(self, values, cut, ids, count) -> None:
        self._core.above(values, cut, ids, count)

    @contextmanager
    def recording(self) -> Iterator[Recorded]:
        self._open()
        recorded = Recorded()
        calls = self._core.record()
        try:
            yield recorded
        finally:
            self._core.end_recording()
        if not calls.spoiled:
            recorded.calls = calls

    def repeat(self, calls: Any, position: int) -> None:
        self._open()
        self._core.repeat(calls, position)

    def repeat_arriving(self, calls: Any, arriving: Any) -> None:
        self._open()
        self._core.repeat_arriving(calls, arriving)

    def _clear(self, x) -> None:
        self._core.clear(x)

    def _add(self, x, added) -> None:
        self._core.add(x, added)

    def _scale(self, x, factor) -> None:
        self._core.scale(x, factor)

    def _linear(self, acts, addresses, piece, start, n, out) -> None:
        q_stride, scale_stride = acts.strides(piece.n_cols)
        self._core.linear(
            acts.x, acts.q, q_stride, acts.scales, scale_stride, acts.quantised,
            piece.ints, addresses, start, n, out,
        )  # fmt: skip

    def _add_rms_norm(self, x, added, weight, eps, out) -> None:
        self._core.add_rms_norm(x, added, weight, eps, out)

    def _attend_token(
        self, q, k, v, rope, keys, values, position, window, scale, cap, out
    ) -> None:
        n_context = keys.shape[1]
        self._check_scratch(n_context)
        self._core.attend_token(
            q, k, v, *rope, keys.reshape(-1).view(np.uint8), values.reshape(-1).view(np.uint8),
            keys.dtype == np.float16, n_context, position, window, scale, cap, self._scratch, out,
        )  # fmt: skip

    def _decode_rows(self, addresses, piece, ids, out) -> None:
        self._core.decode_rows(piece.ints, addresses, ids, out)

    def _rms_norm(self, x, weight, eps, out) -> None:
        self._core.rms_norm(x, weight, eps, out)

    def _layer_norm(self, x, weight, bias, eps, out) -> None:
        self._core.layer_norm(x, weight, bias, eps, out)

    def _rope(self, x, cosines, sines) -> None:
        self._core.rope(x, cosines, sines)

    def _attention(self, q, k, v, first_position, window, scale, cap, out) -> None:
        n_kv_heads, n_context = k.shape[:2]
        self._check_scratch(n_context)
        kv_type = 1 if k.dtype == np.float16 else 0
        self._core.attention(
            q, k.reshape(-1).view(np.uint8), v.reshape(-1).view(np.uint8), kv_type,
            n_kv_heads, n_context, first_position, window, scale, cap, self._scratch, out,
        )  # fmt: skip

    def _check_scratch(self, n_context: int) -> None:
        if n_context > self._scratch_context:
            raise UsageError(
                f"attention over {n_context} keys: attention_scratch was made for "
                f"{self._scratch_context}"
            )

    def _activate(self, kind, pre, up, out) -> None:
        self._core.activate(ACTIVATIONS[kind], pre, up, out)

    def _active_ids(self, pre, out) -> int:
        return self._core.active_ids(pre, out)

    def _mix_tokens(self, kind, x, last, shares, out) -> None:
        self._core.mix_tokens(SHARES[kind], x, last, shares, out)

    def _rwkv4(self, r, k, v, decay, first, memory, exponent, out) -> None:
        self._core.rwkv4(r, k, v, decay, first, memory, exponent, out)

    def _rwkv5(self, tokens, vectors, eps, memory, out) -> None:
        decay, bias = vectors["decay"].reshape(1, -1), None
        if "decay" in tokens:
            decay, bias = tokens["decay"], vectors["decay"]
        self._core.rwkv5(
            tokens["r"], tokens["k"], tokens["v"], tokens.get("g"), decay, bias, vectors["first"],
            vectors["head_norm.weight"], vectors["head_norm.bias"], eps, memory, out,
        )  # fmt: skip

    def _rwkv7(self, tokens, vectors, eps, memory, out) -> None:
        share = tokens.get("share")
        self._core.rwkv7(
            tokens["r"], tokens["decay"], tokens["k"], tokens["rate"], tokens["gate"],
            tokens["v"], share, tokens["first_v"], vectors["decay0"], vectors["rate0"],
            None if share is None else vectors["value0"], vectors["k_k"], vectors["k_a"],
            vectors["bonus"], vectors["head_norm.weight"], vectors["head_norm.bias"], eps, memory,
            out,
        )  # fmt: skip
