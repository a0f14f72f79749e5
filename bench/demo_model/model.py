"""A small Llama-family decoder whose FFN is naturally sparse.

The block is Llama's (RMSNorm before each half, rotary positions in the half-split order, grouped
key/value heads, no biases, tied embeddings) with one change: the FFN has no gate, and its
activation is the squared ReLU of Primer (So et al. 2021, arXiv:2109.08668); `gated` keeps Llama's
gate, with ReLU in place of SiLU. A neuron whose pre-activation is not positive contributes exactly
nothing, so its column of down_proj need not be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ModelConfig:
    """Shape of the network; every dimension is a multiple of 32 (quantisation groups)."""

    vocab_size: int = 4096
    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 3
    head_dim: int = 32
    ffn: int = 1536
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_positions: int = 512
    gated: bool = False


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain, in f32 whatever the autocast type."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotary_tables(cfg: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of shape [max_positions, head_dim] for the half-split rotation."""
    freq = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim)
    angle = torch.outer(torch.arange(cfg.max_positions).float(), freq)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), halves of the head paired."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention; heads // kv_heads query heads share one key/value head."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.q_proj = nn.Linear(cfg.hidden, cfg.heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.hidden, cfg.kv_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden, cfg.kv_heads * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.heads * cfg.head_dim, cfg.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        c = self.cfg
        q = self.q_proj(x).view(b, t, c.heads, c.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, c.kv_heads, c.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, c.kv_heads, c.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        group = c.heads // c.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        # Written out because the fused CPU kernel's backward took 30 ms per layer in a profile.
        # Together with the allocator settings in the README a step went from 0.79 s to 0.59 s; the
        # two changes were not timed apart.
        score = (q @ k.mT).float() * c.head_dim**-0.5
        mask = torch.ones(t, t, dtype=torch.bool).tril()
        y = score.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v
        return self.o_proj(y.transpose(1, 2).reshape(b, t, c.heads * c.head_dim))


class MLP(nn.Module):
    """down(relu(up(x))^2), or down(relu(gate(x)) * up(x))."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden, cfg.ffn, bias=False) if cfg.gated else None
        self.up_proj = nn.Linear(cfg.hidden, cfg.ffn, bias=False)
        self.down_proj = nn.Linear(cfg.ffn, cfg.hidden, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the ReLU values, which the penalty and the measurements need."""
        r = F.relu(self.deciding(x))
        return self.down_proj(r * (r if self.gate_proj is None else self.up_proj(x))), r

    @property
    def deciding(self) -> nn.Linear:
        """The projection whose sign says which neurons are active."""
        return self.up_proj if self.gate_proj is None else self.gate_proj


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y, r = self.mlp(self.post_attention_layernorm(x))
        return x + y, r


class Decoder(nn.Module):
    """Parameter names follow the Hugging Face Llama layout (below the prefix `model.`)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.hidden, cfg.norm_eps)
        cos, sin = rotary_tables(cfg)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset()

    def reset(self) -> None:
        """Matrices keep the scale of their input; both outputs of a block start at zero."""
        for name, p in self.named_parameters():
            if "embed" in name:
                nn.init.normal_(p, std=0.04)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.normal_(p, std=1.0 / math.sqrt(p.shape[1]))

    def hidden(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Final normed states and, per layer, the ReLU values [batch, time, ffn]."""
        t = ids.shape[1]
        x, relus = self.embed_tokens(ids), []
        for block in self.layers:
            x, r = block(x, self.cos[:t], self.sin[:t])
            relus.append(r)
        return self.norm(x), relus

    def logits(self, ids: Tensor) -> Tensor:
        return F.linear(self.hidden(ids)[0], self.embed_tokens.weight)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss in nats, mean ReLU value per layer, active share per layer (no gradient)."""
        h, relus = self.hidden(ids)
        out = F.linear(h, self.embed_tokens.weight)
        loss = F.cross_entropy(out.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
        level = torch.stack([r.float().mean() for r in relus])
        active = torch.stack([(r > 0).float().mean() for r in relus]).detach()
        return loss, level, active
