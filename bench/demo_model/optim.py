"""Muon for the matrices of the blocks, AdamW for the embedding and the gains."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices to g [n, rows, cols] by a quintic Newton-Schulz iteration.

    Coefficients and the use of bfloat16 are those of Muon (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose direction is orthogonalised; equal shapes are treated together."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float, decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                shapes[p.shape].append(p)
            for shape, same in shapes.items():
                self._step_shape(shape, same, group)

    def _step_shape(self, shape: torch.Size, same: list[nn.Parameter], group: dict) -> None:
        directions = []
        for p in same:
            m = self.state[p].setdefault("momentum", torch.zeros_like(p))
            m.lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(m, group["momentum"]))
        update = orthogonalise(torch.stack(directions))
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        for p, u in zip(same, update, strict=True):
            p.mul_(1 - group["lr"] * group["decay"]).add_(u, alpha=-group["lr"] * scale)


def make_optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float, momentum: float, decay: float
) -> list[torch.optim.Optimizer]:
    """Both optimizers; every group remembers its full rate as `base_lr` for the schedule."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, lr=muon_lr, momentum=momentum, decay=decay)
    adam = torch.optim.AdamW(
        rest, lr=adam_lr, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0, foreach=True
    )
    for opt in (muon, adam):
        for group in opt.param_groups:
            group["base_lr"] = group["lr"]
    return [muon, adam]
