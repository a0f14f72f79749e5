"""Keep a chosen share of the FFN neurons active, and none of them dead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from model import Decoder
from torch import Tensor

if TYPE_CHECKING:
    from train import Settings


class Penalty:
    """One L1 weight per layer on the ReLU values, steered so that active shares follow targets.

    A fixed weight gives a share that drifts as the scale of the values does. Here each weight
    moves by at most penalty_rate per step in the log domain: up while more neurons of its layer
    than wanted are active, down while fewer are. The targets fall geometrically from 25 % between
    penalty_from and penalty_full. With a single weight for all layers the first one kept 25 %
    active while the second fell to 0.0 %. Weights per layer brought the first to 10 %; they did not
    bring the second back, which stayed at 0.2 % with its weight at the lower bound.
    penalty_start 0 is no penalty at all, ever.
    """

    def __init__(self, s: Settings) -> None:
        self.s = s
        self.weight = torch.full((len(s.active_targets),), s.penalty_start)
        self.active = torch.full((len(s.active_targets),), 0.25)

    def targets(self, progress: float) -> torch.Tensor:
        s = self.s
        along = (progress - s.penalty_from) / (s.penalty_full - s.penalty_from)
        return 0.25 * (torch.tensor(s.active_targets) / 0.25) ** min(1.0, max(0.0, along))

    def update(self, active: torch.Tensor, progress: float) -> None:
        self.active.lerp_(active, 0.05)
        if progress < self.s.penalty_from or self.s.penalty_start == 0:
            return
        error = (self.active.clamp_min(1e-4) / self.targets(progress)).log()
        self.weight *= (self.s.penalty_rate * (4.0 * error).clamp(-1.0, 1.0)).exp()
        self.weight.clamp_(1e-3, 100.0)


def sparse_rows(x: Tensor, count: int, active: float) -> Tensor:
    """Random rows w of unit-scale entries for which w @ x > 0 holds for about a share of x.

    x is [tokens, hidden]. Adding a multiple of the mean input's direction moves the
    pre-activations down without a bias; the multiple is the one that puts their quantile at zero.
    """
    rows = torch.randn(count, x.shape[1]) / x.shape[1] ** 0.5
    axis = x.mean(0) / x.mean(0).norm()
    along = (x @ axis).clamp_min(1e-3)
    # w @ x > m * along  <=>  (w @ x) / along > m, so m is a quantile of that ratio.
    ratio = (x @ rows.T) / along[:, None]
    return rows - ratio.quantile(1 - active, dim=0)[:, None] * axis


@torch.no_grad()
def revive(model: Decoder, muon: torch.optim.Optimizer, ids: Tensor, active: float) -> list[int]:
    """Redraw the neurons that fire for no token of ids; returns their number per layer.

    A neuron whose pre-activation is never positive gets no gradient and stays dead. It is redrawn
    as in sparse_rows, with a zero column in down_proj so that the output does not change at once.
    """
    x, counts = model.embed_tokens(ids), []
    cos, sin = model.cos[: ids.shape[1]], model.sin[: ids.shape[1]]
    for block in model.layers:
        x = x + block.self_attn(block.input_layernorm(x), cos, sin)
        h = block.post_attention_layernorm(x)
        y, r = block.mlp(h)
        x = x + y
        dead = (r > 0).flatten(0, 1).sum(0) == 0
        counts.append(int(dead.sum()))
        if counts[-1] == 0:
            continue
        deciding, down = block.mlp.deciding.weight, block.mlp.down_proj.weight
        scale = h.square().mean().rsqrt()  # so that pre-activations have unit size
        deciding[dead] = scale * sparse_rows(h.flatten(0, 1)[::4], counts[-1], active)
        down[:, dead] = 0
        muon.state[deciding]["momentum"][dead] = 0
        muon.state[down]["momentum"][:, dead] = 0
    return counts
