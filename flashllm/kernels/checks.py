"""What every operator asks of an array before its address goes to C."""

from __future__ import annotations

import numpy as np

from ..errors import UsageError


def check_array(name: str, array: np.ndarray, dtype: type, shape: tuple, *, out=False) -> None:
    """UsageError unless `array` is C-contiguous, of `dtype` and `shape` (None: any size).

    Runs some fifty times per layer and token: the first test is cheap and settles the good case.
    """
    if isinstance(array, np.ndarray) and array.dtype == dtype:
        found, flags = array.shape, array.flags
        if flags.c_contiguous and (flags.writeable or not out) and len(found) == len(shape):
            for want, have in zip(shape, found, strict=True):
                if want is not None and want != have:
                    break
            else:
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
