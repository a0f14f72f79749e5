"""The llama forward written down in NumPy, token by token: what tests compare functions with.

It takes its weights by role from any checkpoint and shares no code with the engine but the config.
"""

import numpy as np

from flashllm.conversion.resolve import resolve

ACTS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
}


def weights_by_role(checkpoint):
    """(config, {plane or vector name: {part: float64 array as the checkpoint stores it}})."""
    resolved = resolve(checkpoint)

    def read(tensor):
        name = resolved.names[tensor]
        return checkpoint.rows(name, 0, checkpoint.shape(name)[0]).astype(np.float64)

    planes = {
        plane.name: {part: read(tensor) for part, tensor in plane.tensors}
        for plane in resolved.roles.planes
    }
    vectors = {
        vector.name: np.concatenate([read(part) for part in vector.parts])
        for vector in resolved.roles.vectors
    }
    return resolved.config, planes, vectors


def logits(checkpoint, ids):
    """float64 [len(ids), vocab] of a llama-family checkpoint."""
    config, planes, vectors = weights_by_role(checkpoint)
    d, group = config.head_dim, config.n_heads // config.n_kv_heads
    n_q, n_kv = config.n_heads * d, config.n_kv_heads * d

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * weight

    def turn(x, position):
        half = config.rope.n_rotated // 2
        angle = position * config.rope.inverse_frequencies().astype(np.float64)
        a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        cos, sin = (f(angle) * config.rope.attention_factor for f in (np.cos, np.sin))
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=1)

    x = planes["embed"]["row"][ids]
    positions = np.arange(len(ids))
    for i in range(config.n_layers):
        at = f"layers.{i}."
        qkv = np.concatenate([planes[at + "qkv"][part] for part in "qkv"])
        h = norm(x, vectors[at + "attn_norm.weight"]) @ qkv.T + vectors.get(at + "qkv.bias", 0)
        q = h[:, :n_q].reshape(len(ids), -1, d)
        k = h[:, n_q : n_q + n_kv].reshape(len(ids), -1, d)
        v = h[:, n_q + n_kv :].reshape(len(ids), -1, d)
        if config.qk_norm:
            q, k = norm(q, vectors[at + "q_norm.weight"]), norm(k, vectors[at + "k_norm.weight"])
        q = np.stack([turn(row, p) for p, row in zip(positions, q, strict=True)])
        k = np.stack([turn(row, p) for p, row in zip(positions, k, strict=True)])
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(d)
        seen = positions[None, :] <= positions[:, None]
        if config.windows[i]:
            seen &= positions[None, :] > positions[:, None] - config.windows[i]
        scores = np.where(seen, scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", scores, v).reshape(len(ids), -1)
        x = x + mixed @ planes[at + "o"]["row"].T + vectors.get(at + "o.bias", 0)
        x = x + _ffn(config, planes, vectors, at, norm(x, vectors[at + "ffn_norm.weight"]))
    head = planes["head" if "head" in planes else "embed"]["row"]
    return norm(x, vectors["final_norm.weight"]) @ head.T


def _ffn(config, planes, vectors, at, x):
    pieces, act = planes[at + "ffn"], ACTS[config.activation]
    if config.sparse:
        first = planes[at + "deciding"]["row"]
        pre = x @ first.T + vectors.get(at + "deciding.bias", 0)
    else:
        first = "gate" if config.gated else "up"
        pre = x @ pieces[first].T + vectors.get(f"{at}{first}.bias", 0)
    hidden = act(pre)
    if config.gated:
        hidden = hidden * (x @ pieces["up"].T + vectors.get(at + "up.bias", 0))
    return hidden @ pieces["down"].T + vectors.get(at + "ffn.bias", 0)
