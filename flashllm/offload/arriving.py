"""Items of a sparse plane that come in parts, for kernels that take them as they come.

What `Picker.pick` and `Demand.bring` do between a request and its end is here done natively
(ext/fl_bring.c): of a token in half of the memory of a 1.1 B the interpreter took a sixth, most of
it for reads and leases.  They stay for all other cases, and are what this is held to.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from .. import _core
from ..cache.arena import Arena


class Arriving:
    """A request under way.  To be used as a context, which words errors of reading.

    ids        int32, ascending: what is asked for
    addresses  uint64[n_frames]: the plane's table, in which frames appear as they arrive
    native     for KernelSet.add_decided
    """

    __slots__ = (
        "ids", "addresses", "native", "_worded", "_ended", "_arena", "_pid", "_closed",
        "__weakref__",
    )  # fmt: skip

    def __init__(
        self, ids: np.ndarray, addresses: np.ndarray, native: _core.Bring, arena: Arena, *,
        worded: Callable[[_core.ReadFailure], Exception], ended: Callable[[_core.Bring], None],
    ):  # fmt: skip
        self.ids, self.addresses, self.native = ids, addresses, native
        self._worded, self._ended, self._arena = worded, ended, arena
        self._pid, self._closed = os.getpid(), False
        arena.lease()

    def close(self) -> None:
        """Wait until nothing writes to the memory any more, and end the request; idempotent."""
        if self._closed:
            return
        self.native.end()
        self._closed = True
        if os.getpid() == self._pid:  # in a forked child pins and statistics are the parent's
            self._arena.release()
            self._ended(self.native)

    def __enter__(self) -> Arriving:
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        self.close()
        if isinstance(error, _core.ReadFailure):
            raise self._worded(error) from None

    def __del__(self) -> None:
        if not self._closed:
            self.close()
