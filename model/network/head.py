"""Class and box heads: convolutions shared across levels, batch norms per level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network.layers import SeparableConv, run

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
        redundant_bias: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.out_per_anchor = out_per_anchor
        self.convs = nn.ModuleList(
            SeparableConv(width, width, bias=redundant_bias) for _ in range(layers)
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(width) for _ in range(num_levels)) for _ in range(layers)
        )
        self.predict = SeparableConv(width, anchors_per_cell * out_per_anchor)
        for conv in self.convs:
            assert isinstance(conv, SeparableConv)
            conv.init_variance_scaling()
        self.predict.init_variance_scaling(bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        if self.recompute and self.training:
            outputs = [
                run(self._of_levels, [level], [feature], again=True)[0]
                for level, feature in enumerate(features)
            ]
        else:
            outputs = self._of_levels(range(len(features)), features)
        return torch.cat(outputs, dim=1)

    def _of_levels(self, levels: Sequence[int], features: Sequence[Tensor]) -> list[Tensor]:
        """Layer by layer, so that batch norms shared by workers exchange all levels at once."""
        for conv, norms in zip(self.convs, self.norms, strict=True):
            assert isinstance(norms, nn.ModuleList)
            features = _normalise(
                [norms[level] for level in levels], [conv(feature) for feature in features]
            )
            features = [F.silu(feature) for feature in features]
        raw = [self.predict(feature) for feature in features]
        return [r.permute(0, 2, 3, 1).reshape(r.shape[0], -1, self.out_per_anchor) for r in raw]


def _normalise(norms: Sequence[nn.Module], features: Sequence[Tensor]) -> list[Tensor]:
    """Each feature by its own norm; norms that can work `together` do."""
    together = getattr(norms[0], "together", None)
    if together is not None:
        found: list[Tensor] = together(norms, features)
        return found
    return [norm(feature) for norm, feature in zip(norms, features, strict=True)]


def class_bias() -> float:
    """Start every class at probability 0.01, so that the first loss is not all background."""
    return -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)
