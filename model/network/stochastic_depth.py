"""Stochastic depth whose draws belong to samples, not to a process.

timm's DropPath draws from the global generator, so the same image would be dropped differently
on another number of workers or after a restart. Here a step's draws for a whole batch-norm group
come from one generator seeded by (seed, step, group), and each worker takes the rows of its own
images: who computes an image no longer matters.
"""

from __future__ import annotations

import numpy as np
import torch
from timm.layers.drop import DropPath as TimmDropPath
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops the residual branch of whole samples with probability `rate`, scaling the rest."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.keep: Tensor | None = None  # [B, 1, 1, 1] in {0, 1/(1-rate)}, set by `draw`

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.keep is None:
            return branch
        return branch * self.keep.to(branch.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def replace_drop_path(network: nn.Module) -> None:
    """Swap timm's DropPath modules for ours, in place."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, TimmDropPath):
                rate = float(child.drop_prob or 0.0)
                setattr(parent, name, DropPath(rate) if rate > 0 else nn.Identity())


def draw(network: nn.Module, *, seed: tuple[int, int, int], group_size: int, rows: slice) -> None:
    """Set the decisions of every DropPath for the images `rows` of a group of `group_size`.

    seed: (run seed, global step, group index), so that draws do not depend on the past.
    """
    layers = [module for module in network.modules() if isinstance(module, DropPath)]
    if not layers:
        return
    generator = torch.Generator()
    generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
    uniform = torch.rand(group_size, len(layers), generator=generator)[rows]
    device = next(network.parameters()).device
    rates = torch.tensor([layer.rate for layer in layers])
    keep = ((uniform >= rates).float() / (1.0 - rates)).to(device, non_blocking=True)
    for index, layer in enumerate(layers):
        layer.keep = keep[:, index].view(-1, 1, 1, 1)
