"""The contract of a kernel set's RWKV operators: token shift, and what a time-mix does between its
matrices, with its memory taken along token by token.

Part of KernelSet (base.py), whose text holds here too.  Arrays of tokens are float32 [T, n] with
n = n_heads * head_dim, vectors are float32 [n], a memory is float32 [n_heads, head_dim keys,
head_dim values] and is rewritten.  Formulas and the order of sums: docs/ARITHMETIC.md,
"Recurrences"; the slow version is reference_rwkv.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from ..errors import UnknownNameError, UsageError
from .checks import check_array

# How much of each token is its own in a mix: the share says it of the token itself ("now"), or of
# the one before ("past"), to which "past plus" adds what `out` holds for each token.
SHARES = {"now": 0, "past": 1, "past plus": 2}
MAX_MIXES = 8
MAX_RWKV_HEAD = 512

# Names of the vectors that rwkv7 wants; the last only where there is a share of the first values.
VECTORS_7 = (
    "decay0", "rate0", "k_k", "k_a", "bonus", "head_norm.weight", "head_norm.bias", "value0"
)  # fmt: skip


class RecurrentOperators(ABC):
    """The RWKV part of a kernel set."""

    @abstractmethod
    def _open(self) -> None: ...

    def mix_tokens(
        self,
        kind: str,
        x: np.ndarray,
        last: np.ndarray,
        shares: tuple[np.ndarray, ...],
        out: np.ndarray,
    ) -> None:
        """out[m, t] = x[t] and its predecessor mixed by the vector shares[m].

        The predecessor of token 0 is `last` [n]; x [T, n], out [len(shares), T, n].
        """
        self._open()
        if kind not in SHARES:
            raise UnknownNameError("kind of mix", kind, list(SHARES))
        check_array("x", x, np.float32, (None, None))
        check_array("last", last, np.float32, (x.shape[1],))
        if not 1 <= len(shares) <= MAX_MIXES:
            raise UsageError(f"{len(shares)} mixes; 1..{MAX_MIXES} go at once")
        for share in shares:
            check_array("share", share, np.float32, last.shape)
        check_array("out", out, np.float32, (len(shares), *x.shape), out=True)
        if x.size:
            self._mix_tokens(kind, x, last, shares, out)

    def rwkv4(
        self,
        r: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        decay: np.ndarray,
        first: np.ndarray,
        memory: np.ndarray,
        exponent: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """out = sigmoid(r) times the decayed average of values; memory [2, n], out may be r."""
        self._open()
        check_array("r", r, np.float32, (None, None))
        n = r.shape[1]
        for name, tokens in (("k", k), ("v", v)):
            check_array(name, tokens, np.float32, r.shape)
        for name, vector in (("decay", decay), ("first", first)):
            check_array(name, vector, np.float32, (n,))
        check_array("memory", memory, np.float32, (2, n), out=True)
        check_array("exponent", exponent, np.float32, (n,), out=True)
        check_array("out", out, np.float32, r.shape, out=True)
        if r.size:
            self._rwkv4(r, k, v, decay, first, memory, exponent, out)

    def rwkv5(
        self,
        tokens: Mapping[str, np.ndarray],
        vectors: Mapping[str, np.ndarray],
        eps: float,
        memory: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """Versions 5 and 6: recall, head norm, and silu(g) where there is a g; out [T, n].

        tokens   "r", "k", "v", and perhaps "g"; "decay" in version 6: before bias and exponentials
        vectors  "first", "decay" (the factor itself, or version 6's bias), "head_norm.weight" and
                 "head_norm.bias"
        """
        self._check_heads(memory, out)
        for name in ("r", "k", "v", *(name for name in ("g", "decay") if name in tokens)):
            check_array(name, tokens[name], np.float32, out.shape)
        for name in ("first", "decay", "head_norm.weight", "head_norm.bias"):
            check_array(name, vectors[name], np.float32, out.shape[1:])
        if out.size:
            self._rwkv5(tokens, vectors, eps, memory, out)

    def rwkv7(
        self,
        tokens: Mapping[str, np.ndarray],
        vectors: Mapping[str, np.ndarray],
        eps: float,
        memory: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """Version 7: recall, head norm, bonus and gate; out [T, n].

        tokens   "r", "k", "v", "gate"; "decay", "rate" and, past the first layer, "share" before
                 their biases; "first_v", written without a share and read with one; "v" is drawn
                 towards it in place
        vectors  those of VECTORS_7
        """
        self._check_heads(memory, out)
        shared = "share" in tokens
        for name in ("r", "k", "v", "gate", "decay", "rate", "first_v"):
            check_array(name, tokens[name], np.float32, out.shape, out=name in ("v", "first_v"))
        if shared:
            check_array("share", tokens["share"], np.float32, out.shape)
        for name in VECTORS_7 if shared else VECTORS_7[:-1]:
            check_array(name, vectors[name], np.float32, out.shape[1:])
        if out.size:
            self._rwkv7(tokens, vectors, eps, memory, out)

    def _check_heads(self, memory: np.ndarray, out: np.ndarray) -> None:
        self._open()
        check_array("memory", memory, np.float32, (None, None, None), out=True)
        n_heads, keys, values = memory.shape
        if keys != values or not 1 <= keys <= MAX_RWKV_HEAD or n_heads < 1:
            raise UsageError(
                f"memory {list(memory.shape)} is not [heads, n, n] with n in 1..{MAX_RWKV_HEAD}"
            )
        check_array("out", out, np.float32, (None, n_heads * keys), out=True)

    @abstractmethod
    def _mix_tokens(self, kind, x, last, shares, out) -> None: ...

    @abstractmethod
    def _rwkv4(self, r, k, v, decay, first, memory, exponent, out) -> None: ...

    @abstractmethod
    def _rwkv5(self, tokens, vectors, eps, memory, out) -> None: ...

    @abstractmethod
    def _rwkv7(self, tokens, vectors, eps, memory, out) -> None: ...
