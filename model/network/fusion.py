"""Weighted feature fusion: how the inputs of one pyramid node become one feature.

Shapes: each input [B, W, h, w], all equal; weights: one float32 scalar per input, init 1.
The weights are normalised in float32 even under autocast: 2 + 1e-4 is 2 in bfloat16.
A running weighted sum is used, no stack, so at most one product is alive at a time.
Source: arXiv 1911.09070v7 §3.3; google/automl `efficientdet_keras.py` (epsilon 1e-4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPSILON = 1e-4


class Fusion(nn.Module):
    """Base: `normalise` turns raw weights [n] into the factors of the inputs [n]."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_inputs, dtype=torch.float32))

    def normalise(self, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        factors = self.normalise(self.weights.float()).to(inputs[0].dtype)
        fused = inputs[0] * factors[0]
        for index in range(1, len(inputs)):
            fused = fused + inputs[index] * factors[index]
        return fused


class FastFusion(Fusion):
    """relu(w_i) / (sum relu(w) + 1e-4). A weight that falls to 0 gets no gradient any more."""

    def normalise(self, weights: Tensor) -> Tensor:
        positive = torch.relu(weights)
        return positive / (positive.sum() + EPSILON)


class SoftmaxFusion(Fusion):
    """softmax(w): bounded, smooth, slower (paper §3.3)."""

    def normalise(self, weights: Tensor) -> Tensor:
        return torch.softmax(weights, dim=0)


class UnboundedFusion(Fusion):
    """The raw weights. The paper warns of instability; at the start it equals `sum`."""

    def normalise(self, weights: Tensor) -> Tensor:
        return weights


class SumFusion(nn.Module):
    """Plain sum without parameters, used by D6, D7 and D7x."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        fused = inputs[0]
        for feature in inputs[1:]:
            fused = fused + feature
        return fused


FUSIONS: dict[str, type[Fusion] | type[SumFusion]] = {
    "fast": FastFusion,
    "softmax": SoftmaxFusion,
    "unbounded": UnboundedFusion,
    "sum": SumFusion,
}
