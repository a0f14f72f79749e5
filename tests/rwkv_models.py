"""Tiny random RWKV models: official tensors, rwkv.cpp files made of them, and a slow oracle.

The oracle is written from the papers (arXiv 2305.13048, 2404.05892, 2503.14456) in float64, one
token and one head at a time, on the official tensors; it shares no code with the package.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

VERSIONS = ("4", "5.1", "5.2", "6", "7")
N, FFN, HEADS, LAYERS, VOCAB = 64, 96, 4, 3, 256
SIZE = N // HEADS
RANK_MIX, RANK = 8, 12


def official(version: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors under the names and in the shapes of the official checkpoints, every one random."""
    rng = np.random.default_rng(seed)

    def matrix(*shape):
        return (rng.standard_normal(shape) * shape[-1] ** -0.5 * 1.5).astype(np.float32)

    def vector(*shape, low=0.0, high=1.0):
        return rng.uniform(low, high, shape).astype(np.float32)

    def norm(name):
        return {f"{name}.weight": vector(N, low=0.5, high=1.5), f"{name}.bias": vector(N, low=-0.5)}

    t = {"emb.weight": matrix(VOCAB, N), **norm("blocks.0.ln0"), **norm("ln_out")}
    t["head.weight"] = matrix(VOCAB, N) * 2
    for i in range(LAYERS):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        t |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2")
        for name in ("receptance", "key", "value", "output"):
            t[f"{att}{name}.weight"] = matrix(N, N)
        t[ffn + "key.weight"], t[ffn + "value.weight"] = matrix(FFN, N), matrix(N, FFN)
        if version != "7":
            t[ffn + "receptance.weight"] = matrix(N, N)
        if version != "4":
            t |= norm(f"{att}ln_x")
        if version in ("5.2", "6"):
            t[att + "gate.weight"] = matrix(N, N)
        if version in ("4", "5.1", "5.2"):
            for x in "kvr" + ("g" if version == "5.2" else ""):
                t[f"{att}time_mix_{x}"] = vector(1, 1, N)
            for x in "kr":
                t[f"{ffn}time_mix_{x}"] = vector(1, 1, N)
        if version == "4":
            t[att + "time_decay"] = vector(N, low=-3, high=1)
            t[att + "time_first"] = vector(N, low=-1)
        if version == "5.1":
            t[att + "time_decay"] = vector(HEADS, low=-3, high=1)
            t[att + "time_first"] = vector(HEADS, low=-2, high=0)
        if version == "5.2":
            t[att + "time_decay"] = vector(HEADS, SIZE, low=-3, high=1)
        if version in ("5.2", "6"):
            t[att + "time_faaaa"] = vector(HEADS, SIZE, low=-0.5)
        if version == "6":
            for x in "xwkvrg":
                t[f"{att}time_maa_{x}"] = vector(1, 1, N)
            for x in "kr":
                t[f"{ffn}time_maa_{x}"] = vector(1, 1, N)
            t[att + "time_maa_w1"] = matrix(N, 5 * RANK_MIX)
            t[att + "time_maa_w2"] = matrix(5, RANK_MIX, N)
            t[att + "time_decay"] = vector(1, 1, N, low=-3, high=1)
            t[att + "time_decay_w1"], t[att + "time_decay_w2"] = matrix(N, RANK), matrix(RANK, N)
        if version == "7":
            for x in "rwkvag":
                t[f"{att}x_{x}"] = vector(1, 1, N)
            t[ffn + "x_k"] = vector(1, 1, N)
            for k, x in enumerate("wavg"):
                t[f"{att}{x}1"], t[f"{att}{x}2"] = matrix(N, RANK + k), matrix(RANK + k, N)
            for x in ("w0", "a0", "v0", "k_k", "k_a"):
                t[att + x] = vector(1, 1, N, low=-1)
            t[att + "r_k"] = vector(HEADS, SIZE, low=-1)
            if i == 0:  # some files have these of layer 0 and some do not; nobody reads them
                for x in ("v0", "v1", "v2"):
                    del t[att + x]
    return t


def exported(t: dict[str, np.ndarray], version: str) -> dict[str, np.ndarray]:
    """The tensors as rwkv.cpp's exporter would write them."""
    out = {}
    for name, a in t.items():
        last = name.split(".")[-1]
        if last.startswith("time_"):
            a = a.squeeze()
        if last == "time_decay" and version == "4":
            a = -np.exp(a)
        if last == "time_decay" and version in ("5.1", "5.2"):
            a = np.exp(-np.exp(a)).reshape(HEADS, -1, 1)
        if last == "time_first" and version == "5.1":
            a = np.exp(a).reshape(-1, 1, 1)
        if last == "time_faaaa":
            a = a[:, :, None]
        if last in ("time_maa_w1", "time_decay_w1", "time_decay_w2"):
            a = a.T
        if last == "time_maa_w2":
            a = a.transpose(0, 2, 1)
        if version == "7" and last in [x + k for x in "wavg" for k in "12"]:
            a = a.T
        if last.startswith("x_") and ".att." in name:
            if last != "x_r":
                continue
            prefix = name[: -len("r")]
            a, name = np.concatenate([t[prefix + x] for x in "rwkvag"]), prefix + "rwkvag"
        out[name] = np.ascontiguousarray(a, "<f4")
    return out


def record(name: str, a: np.ndarray, code: int, data: bytes) -> bytes:
    head = struct.pack("<3i", a.ndim, len(name), code) + struct.pack(f"<{a.ndim}i", *a.shape[::-1])
    return head + name.encode() + data


def header(code: int = 0, *, version: int = 101, sizes=(VOCAB, N, LAYERS)) -> bytes:
    return struct.pack("<I5i", 0x67676D66, version, *sizes, code)


def written(path: Path, tensors: dict[str, np.ndarray], *, half: bool = False) -> Path:
    """An rwkv.cpp file of exported tensors; `half`: matrices as FP16, as that exporter does."""
    parts = [header(int(half))]
    for name, a in tensors.items():
        if half and a.ndim > 1 and ".time_" not in name:
            parts.append(record(name, a, 1, a.astype("<f2").tobytes()))
        else:
            parts.append(record(name, a, 0, a.tobytes()))
    path.write_bytes(b"".join(parts))
    return path


def _ln(x, weight, bias, eps=1e-5):
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle(t: dict[str, np.ndarray], version: str, ids) -> np.ndarray:
    """float64 logits [len(ids), VOCAB] of official tensors."""
    w = {name: a.astype(np.float64) for name, a in t.items()}
    state = [{"att": np.zeros(N), "ffn": np.zeros(N)} for _ in range(LAYERS)]
    for s in state:
        s |= {"num": np.zeros(N), "den": np.zeros(N), "S": np.zeros((HEADS, SIZE, SIZE))}
    rows = []
    for token in ids:
        x = _ln(w["emb.weight"][token], w["blocks.0.ln0.weight"], w["blocks.0.ln0.bias"])
        shared = {}
        for i in range(LAYERS):
            b = f"blocks.{i}."
            p = {name[len(b):]: a for name, a in w.items() if name.startswith(b)}
            y = _ln(x, p["ln1.weight"], p["ln1.bias"])
            x = x + ATT[version](p, y, state[i], shared, i)
            state[i]["att"] = y
            y = _ln(x, p["ln2.weight"], p["ln2.bias"])
            x = x + _channel(p, version, y, state[i]["ffn"])
            state[i]["ffn"] = y
        rows.append(w["head.weight"] @ _ln(x, w["ln_out.weight"], w["ln_out.bias"]))
    return np.array(rows)


def _channel(p, version, y, last):
    if version in ("6", "7"):
        share = {x: p[f"ffn.{'time_maa' if version == '6' else 'x'}_{x}"].ravel()
                 for x in ("kr" if version == "6" else "k")}
        mixed = {x: y + (last - y) * a for x, a in share.items()}
    else:
        mixed = {x: y * (m := p[f"ffn.time_mix_{x}"].ravel()) + last * (1 - m) for x in "kr"}
    out = p["ffn.value.weight"] @ np.maximum(p["ffn.key.weight"] @ mixed["k"], 0) ** 2
    return out if version == "7" else out * _sigmoid(p["ffn.receptance.weight"] @ mixed["r"])


def _att4(p, y, s, shared, layer):
    m = {x: y * (a := p[f"att.time_mix_{x}"].ravel()) + s["att"] * (1 - a) for x in "kvr"}
    k, v = p["att.key.weight"] @ m["k"], p["att.value.weight"] @ m["v"]
    first = np.exp(p["att.time_first"] + k)
    out = (s["num"] + first * v) / (s["den"] + first)
    decay = np.exp(-np.exp(p["att.time_decay"]))
    s["num"] = decay * s["num"] + np.exp(k) * v
    s["den"] = decay * s["den"] + np.exp(k)
    return p["att.output.weight"] @ (_sigmoid(p["att.receptance.weight"] @ m["r"]) * out)


def _heads(p, s, r, k, v, decay, first, eps):
    out = np.zeros(N)
    for h in range(HEADS):
        at = slice(h * SIZE, (h + 1) * SIZE)
        kv = np.outer(k[at], v[at])
        o = r[at] @ (first[h][:, None] * kv + s["S"][h])
        s["S"][h] = decay[h][:, None] * s["S"][h] + kv
        out[at] = (o - o.mean()) / np.sqrt(o.var() + eps)
    return out * p["att.ln_x.weight"] + p["att.ln_x.bias"]


def _att5(p, y, s, shared, layer):
    gated = "att.gate.weight" in p
    m = {x: y * (a := p[f"att.time_mix_{x}"].ravel()) + s["att"] * (1 - a)
         for x in ("kvrg" if gated else "kvr")}
    k, v = p["att.key.weight"] @ m["k"], p["att.value.weight"] @ m["v"]
    r = p["att.receptance.weight"] @ m["r"]
    decay = np.exp(-np.exp(p["att.time_decay"].reshape(HEADS, -1))) * np.ones(SIZE)
    if gated:
        first = p["att.time_faaaa"]
    else:
        first = np.exp(p["att.time_first"].reshape(HEADS, 1)) * np.ones(SIZE)
    out = _heads(p, s, r, k, v, decay, first, 1e-5)
    if gated:
        g = p["att.gate.weight"] @ m["g"]
        out = out * g * _sigmoid(g)
    return p["att.output.weight"] @ out


def _att6(p, y, s, shared, layer):
    d = s["att"] - y
    low = np.tanh((y + d * p["att.time_maa_x"].ravel()) @ p["att.time_maa_w1"]).reshape(5, -1)
    m = {}
    for j, x in enumerate("wkvrg"):
        m[x] = y + d * (p[f"att.time_maa_{x}"].ravel() + low[j] @ p["att.time_maa_w2"][j])
    decay = p["att.time_decay"].ravel() + np.tanh(m["w"] @ p["att.time_decay_w1"]) @ (
        p["att.time_decay_w2"]
    )
    k, v = p["att.key.weight"] @ m["k"], p["att.value.weight"] @ m["v"]
    r, g = p["att.receptance.weight"] @ m["r"], p["att.gate.weight"] @ m["g"]
    decay = np.exp(-np.exp(decay)).reshape(HEADS, SIZE)
    out = _heads(p, s, r, k, v, decay, p["att.time_faaaa"], 64e-5)
    return p["att.output.weight"] @ (out * g * _sigmoid(g))


def _att7(p, y, s, shared, layer):
    d = s["att"] - y
    m = {x: y + d * p[f"att.x_{x}"].ravel() for x in "rwkvag"}
    r = p["att.receptance.weight"] @ m["r"]
    k, v = p["att.key.weight"] @ m["k"], p["att.value.weight"] @ m["v"]
    decay = np.exp(
        -np.exp(-0.5) * _sigmoid(p["att.w0"].ravel() + np.tanh(m["w"] @ p["att.w1"]) @ p["att.w2"])
    )
    a = _sigmoid(p["att.a0"].ravel() + m["a"] @ p["att.a1"] @ p["att.a2"])
    g = _sigmoid(m["g"] @ p["att.g1"]) @ p["att.g2"]
    if layer == 0:
        shared["v"] = v
    else:
        share = _sigmoid(p["att.v0"].ravel() + m["v"] @ p["att.v1"] @ p["att.v2"])
        v = v + (shared["v"] - v) * share
    unit = (k * p["att.k_k"].ravel()).reshape(HEADS, SIZE)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    k = k * (1 + (a - 1) * p["att.k_a"].ravel())
    out = np.zeros(N)
    for h in range(HEADS):
        at = slice(h * SIZE, (h + 1) * SIZE)
        S = s["S"][h]  # values down, keys across, as in the paper
        S = S * decay[at] - S @ np.outer(unit[h], a[at] * unit[h]) + np.outer(v[at], k[at])
        s["S"][h] = S
        o = S @ r[at]
        out[at] = (o - o.mean()) / np.sqrt(o.var() + 64e-5)
    out = out * p["att.ln_x.weight"] + p["att.ln_x.bias"]
    for h in range(HEADS):
        at = slice(h * SIZE, (h + 1) * SIZE)
        out[at] += (r[at] * k[at] * p["att.r_k"][h]).sum() * v[at]
    return p["att.output.weight"] @ (out * g)


ATT = {"4": _att4, "5.1": _att5, "5.2": _att5, "6": _att6, "7": _att7}
