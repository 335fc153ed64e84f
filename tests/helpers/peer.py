"""effdet, the peer whose numbers ours must equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Statistics, affine parameters and fusion weights a trained network could have."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in network.named_parameters():
        if name.endswith(("edge_weights", "fuse.weights")):
            nn.init.uniform_(parameter, 0.2, 2.0)


def flat(levels: list[Tensor], width: int) -> Tensor:
    """The peer's outputs by level [B, A_l * width, h, w] -> [B, A, width], as ours are."""
    batch = levels[0].shape[0]
    return torch.cat([x.permute(0, 2, 3, 1).reshape(batch, -1, width) for x in levels], dim=1)
