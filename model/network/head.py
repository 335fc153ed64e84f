"""Class and box heads: convolutions shared across levels, batch norms per level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network.layers import SeparableConv

PRIOR_PROBABILITY = 0.01


class Head(nn.Module):
    """[P_l: [B, W, h_l, w_l]] -> [B, sum(h_l w_l) * A, out] for A anchors a cell.

    layers x [shared separable conv -> batch norm of the level -> swish], then a shared predictor.
    Order of the result: level, then row, then column, then anchor (scale-major, ratio-minor).
    """

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        num_levels: int,
        anchors_per_cell: int,
        out_per_anchor: int,
        bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.out_per_anchor = out_per_anchor
        self.convs = nn.ModuleList(SeparableConv(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(width) for _ in range(num_levels)) for _ in range(layers)
        )
        self.predict = SeparableConv(width, anchors_per_cell * out_per_anchor)
        for conv in self.convs:
            assert isinstance(conv, SeparableConv)
            conv.init_variance_scaling()
        self.predict.init_variance_scaling(bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        outputs = []
        for level, feature in enumerate(features):
            for conv, norms in zip(self.convs, self.norms, strict=True):
                assert isinstance(norms, nn.ModuleList)
                feature = F.silu(norms[level](conv(feature)))
            raw = self.predict(feature)
            outputs.append(raw.permute(0, 2, 3, 1).reshape(raw.shape[0], -1, self.out_per_anchor))
        return torch.cat(outputs, dim=1)


def class_bias() -> float:
    """Start every class at probability 0.01, so that the first loss is not all background."""
    return -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)
