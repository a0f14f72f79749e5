"""RWKV's operators in NumPy, token by token, in float64; the memory is float32 between tokens.

Read this before ext/fl_simd_rwkv.h.  Peng et al., arXiv 2305.13048 (version 4), 2404.05892 (5, 6)
and 2503.14456 (7).
"""

from __future__ import annotations

import numpy as np

_DECAY_7 = -0.606531  # -exp(-0.5) as the checkpoints' authors round it
_LEAST_NORM = 1e-12


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


class ReferenceRecurrences:
    """The RWKV part of the reference set."""

    def _mix_tokens(self, kind, x, last, shares, out) -> None:
        before = np.concatenate([last[None], x[:-1]])
        for m, share in enumerate(shares):
            if kind == "now":
                out[m] = before + share * (x - before)
            else:
                more = out[m] if kind == "past plus" else 0
                out[m] = x + (share + more) * (before - x)

    def _rwkv4(self, r, k, v, decay, first, memory, exponent, out) -> None:
        """memory: numerator and denominator, both divided by exp(exponent), the largest so far."""
        for t in range(len(r)):
            key, value, top = (a.astype(np.float64) for a in (k[t], v[t], exponent))
            most = np.maximum(top, first + key)
            old, new = np.exp(top - most), np.exp(first + key - most)
            average = (old * memory[0] + new * value) / (old * memory[1] + new)
            out[t] = sigmoid(r[t].astype(np.float64)) * average
            faded = top + decay
            exponent[:] = np.maximum(faded, key)
            old, new = np.exp(faded - exponent), np.exp(key - exponent)
            memory[:] = old * memory + new * np.stack([value, np.ones_like(value)])

    def _rwkv5(self, tokens, vectors, eps, memory, out) -> None:
        """Memory S [keys, values]: out = r (first * k v + S), S = decay * S + k v."""
        heads = memory.shape[:2]
        down, across = (*heads, 1), (heads[0], 1, heads[1])
        first = vectors["first"].reshape(down)
        for t in range(len(out)):
            r, k, v = (tokens[name][t].astype(np.float64) for name in "rkv")
            decay = vectors["decay"].astype(np.float64)
            if "decay" in tokens:
                with np.errstate(over="ignore"):
                    decay = np.exp(-np.exp(tokens["decay"][t] + decay))
            product = k.reshape(down) * v.reshape(across)
            found = (r.reshape(down) * (first * product + memory)).sum(axis=1)
            memory[:] = decay.reshape(down) * memory + product
            normed = _head_norm(found, vectors, eps)
            if "g" in tokens:
                gate = tokens["g"][t].astype(np.float64)
                normed = normed * (gate * sigmoid(gate))
            out[t] = normed

    def _rwkv7(self, tokens, vectors, eps, memory, out) -> None:
        """S = decay * S - (rate * u) (u S) + k v with unit keys u; out = r S + (r . bonus k) v."""
        heads = memory.shape[:2]
        down, across = (*heads, 1), (heads[0], 1, heads[1])
        for t in range(len(out)):
            at = {name: values[t].astype(np.float64) for name, values in tokens.items()}
            if "share" in tokens:
                towards = sigmoid(at["share"] + vectors["value0"])
                tokens["v"][t] = at["v"] + (at["first_v"] - at["v"]) * towards
            else:
                tokens["first_v"][t] = at["v"]
            v = tokens["v"][t].astype(np.float64)
            decay = np.exp(_DECAY_7 * sigmoid(at["decay"] + vectors["decay0"])).reshape(down)
            rate = sigmoid(at["rate"] + vectors["rate0"])
            unit = (at["k"] * vectors["k_k"]).reshape(heads)
            length = np.sqrt((unit * unit).sum(axis=1, keepdims=True))
            unit = unit / np.maximum(length, _LEAST_NORM)
            k = at["k"] * (1 + (rate - 1) * vectors["k_a"])
            found = (memory * unit[:, :, None]).sum(axis=1)  # what is remembered under this key
            unlearnt = (unit * rate.reshape(heads))[:, :, None] * found[:, None, :]
            memory[:] = memory * decay - unlearnt + k.reshape(down) * v.reshape(across)
            recalled = (at["r"].reshape(down) * memory).sum(axis=1)
            bonus = (at["r"] * k * vectors["bonus"]).reshape(heads).sum(axis=1, keepdims=True)
            total = _head_norm(recalled, vectors, eps) + (bonus * v.reshape(heads)).reshape(-1)
            out[t] = total * at["gate"]


def _head_norm(x: np.ndarray, vectors, eps: float) -> np.ndarray:
    """Each head of x [n_heads, head_dim] normed alone; then weight and bias, over all channels."""
    centred = x - x.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + eps)
    return normed.reshape(-1) * vectors["head_norm.weight"] + vectors["head_norm.bias"]
