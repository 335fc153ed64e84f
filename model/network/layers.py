"""The two blocks that pyramid and heads are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.network.scaling import Padding

Out = TypeVar("Out")


class SeparableConv(nn.Module):
    """3x3 depthwise without bias, then 1x1 pointwise; no norm, no activation."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pointwise(self.depthwise(x))
        return out

    def init_glorot(self) -> None:
        """TF's Glorot uniform, used in the pyramid (google/automl defaults)."""
        for conv in (self.depthwise, self.pointwise):
            glorot_uniform(conv.weight)
        zero_bias(self.pointwise)

    def init_variance_scaling(self, bias: float = 0.0) -> None:
        """Normal with variance 1/fan_in, used in the heads (google/automl `class_net`)."""
        for conv in (self.depthwise, self.pointwise):
            fan_in = conv.weight[0].numel()
            nn.init.normal_(conv.weight, std=1.0 / math.sqrt(fan_in))
        if self.pointwise.bias is not None:
            nn.init.constant_(self.pointwise.bias, bias)


def run(block: Callable[..., Out], *inputs: Any, again: bool) -> Out:
    """`block(*inputs)`; with `again` only its inputs are kept, and backward computes it once more.

    The second pass moves batch norms' running statistics a second time: see
    `model.training.batch_norm.RunningStatistics`.
    """
    if not again:
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


def glorot_uniform(weight: Tensor) -> None:
    """Uniform with variance 2/(fan_in + fan_out); TF's fans of a depthwise kernel are both k*k."""
    receptive = weight[0][0].numel()
    fan_in = weight.shape[1] * receptive
    depthwise = weight.shape[1] == 1 and receptive > 1
    fan_out = receptive if depthwise else weight.shape[0] * receptive
    limit = math.sqrt(6.0 / (fan_in + fan_out))
    nn.init.uniform_(weight, -limit, limit)


def zero_bias(conv: nn.Conv2d) -> None:
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def max_pool_same(x: Tensor, stride: int = 2) -> Tensor:
    """Max-pool with kernel stride+1 and TF's SAME padding, without a padded copy.

    x: [B, C, h, w] -> [B, C, ceil(h/stride), ceil(w/stride)]. For stride 2 an even side is padded
    on the far end only, which `ceil_mode` does for free (out of range is minus infinity, not 0).
    """
    if stride == 2:
        return F.max_pool2d(x, 3, 2, padding=(x.shape[-2] % 2, x.shape[-1] % 2), ceil_mode=True)
    pads: list[int] = []
    for side in (x.shape[-1], x.shape[-2]):
        total = max(0, (-(-side // stride) - 1) * stride + stride + 1 - side)
        pads += [total // 2, total - total // 2]
    return F.max_pool2d(F.pad(x, pads, value=float("-inf")), stride + 1, stride)


def max_pool(x: Tensor, stride: int, padding: Padding) -> Tensor:
    """Down-sampling by a whole factor. "symmetric" is defined for 2 only; larger strides are SAME."""
    if padding == "symmetric" and stride == 2:
        return F.max_pool2d(x, 3, 2, padding=1)
    return max_pool_same(x, stride)


def resize_to(x: Tensor, side: tuple[int, int], padding: Padding = "same") -> Tensor:
    """Nearest up-sampling or max-pooling of [B, C, h, w] to [B, C, *side]."""
    height, width = x.shape[-2:]
    if (height, width) == side:
        return x
    if height >= side[0] and width >= side[1]:
        return max_pool(x, (height - 1) // side[0] + 1, padding)
    return F.interpolate(x, size=side, mode="nearest")
