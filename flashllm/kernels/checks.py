"""What every operator asks of an array before its address goes to C."""

from __future__ import annotations

import numpy as np

from .._core import is_array
from ..errors import UsageError

# How a buffer of these says what its items are.
_CODES = {
    dtype: ord(memoryview(np.empty(0, dtype)).format)
    for dtype in (np.float32, np.float16, np.int32, np.int64, np.uint8, np.uint64)
}

ACTIVATIONS = {
    "silu": 0, "relu": 1, "relu2": 2, "gelu": 3, "gelu_tanh": 4, "sigmoid": 5, "tanh": 6
}  # fmt: skip


def check_array(name: str, array: np.ndarray, dtype: type, shape: tuple, *, out=False) -> None:
    """UsageError unless `array` is C-contiguous, of `dtype` and `shape` (None: any size).

    Runs some fifty times per layer and token: the good case is settled in one native call.
    """
    if isinstance(array, np.ndarray) and is_array(array, _CODES[dtype], shape, out):
        return
    _refuse_array(name, array, dtype, shape, out)


def _refuse_array(name: str, array: np.ndarray, dtype: type, shape: tuple, out: bool) -> None:
    """Say what is wrong with an array that check_array did not accept."""
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        found = getattr(array, "dtype", type(array).__name__)
        raise UsageError(f"{name} must be {np.dtype(dtype).name}, not {found}")
    if len(array.shape) != len(shape) or any(
        want is not None and want != have for want, have in zip(shape, array.shape, strict=True)
    ):
        wanted = [("any" if n is None else n) for n in shape]
        raise UsageError(f"{name} must have shape {wanted}, not {list(array.shape)}")
    if not array.flags.c_contiguous:
        raise UsageError(f"{name} must be C-contiguous; its strides are {array.strides}")
    raise UsageError(f"{name} is written to, but read-only")


def check_width(name: str, array: np.ndarray, n: int) -> None:
    """UsageError unless the rows of `array` have at least `n` columns."""
    if array.shape[1] < n:
        raise UsageError(f"{name} must have at least {n} columns, not {array.shape[1]}")
