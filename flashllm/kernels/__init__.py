"""Choose a kernel set once: `choose_kernels()`.  Adding one is a file in ext/ and a line here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..errors import UsageError
from ..registry import Registry
from .base import Activations, KernelSet, PieceView
from .native import NativeSet, trouble
from .reference import ReferenceSet

# Best first; "auto" takes the first that runs here, and never `reference`.
KERNELS: Registry[Callable[..., KernelSet]] = Registry(
    "kernel set",
    {name: partial(NativeSet, name) for name in ("avx512", "avx2", "neon", "serial")}
    | {"reference": ReferenceSet},
)
MAX_THREADS = 256


def kernel_troubles() -> dict[str, str | None]:
    """Every known set: None when it runs on this machine, else the reason why not."""
    return {name: None if name == "reference" else trouble(name) for name in KERNELS}


def choose_kernels(name: str | None = None, *, n_threads: int = 2) -> KernelSet:
    """Make the kernel set `name`; None or "auto" takes the best one here.

    Raises UnknownNameError for a name that is not in the table, UnsupportedError for a set that
    this processor or operating system cannot run, UsageError for a thread count outside 1..256.
    """
    name = name or "auto"
    if (
        isinstance(n_threads, bool)
        or not isinstance(n_threads, int)
        or not (1 <= n_threads <= MAX_THREADS)
    ):
        raise UsageError(f"n_threads must be 1..{MAX_THREADS}, not {n_threads!r}")
    if name == "auto":
        name = next(known for known, why in kernel_troubles().items() if why is None)
    return KERNELS[name](n_threads=n_threads)


__all__ = [
    "KERNELS",
    "Activations",
    "KernelSet",
    "PieceView",
    "choose_kernels",
    "kernel_troubles",
]
