"""Batch norm over a fixed number of images, whoever holds them.

Shape legend: C channels, g images of a group, s workers that share it, G groups of a step.

A group's statistics are the recipe's, not the world size's. Whole groups need no traffic. A group
shared by a team of workers needs one exchange forward and one backward in every layer. Running
statistics then move once a step, by the average of the groups, in one small reduction.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from model.data.sampler import BatchPlan


class TeamBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d over the images of all workers of a process group, for any backend.

    torch's own SyncBatchNorm refuses CPU tensors. `activation` follows, as in timm's BatchNormAct.
    """

    def __init__(self, channels: int, *, activation: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__(channels)
        self.act, self.group = activation, group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return cast(Tensor, self.act(super().forward(x)))
        out, mean, variance = cast(
            "tuple[Tensor, Tensor, Tensor]",
            _TeamNormalise.apply(x, self.weight, self.bias, self.eps, self.group),
        )
        assert self.running_mean is not None
        assert self.running_var is not None
        count = x.numel() // x.shape[1] * dist.get_world_size(self.group)
        with torch.no_grad():
            momentum = cast(float, self.momentum)
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (count / max(1, count - 1)), momentum)
        return cast(Tensor, self.act(out))


class _TeamNormalise(torch.autograd.Function):
    """(x - mean) / std * weight + bias with mean and variance of the whole team's images.

    One exchange forward (each worker's sum and squares around its own mean, combined exactly) and
    one backward (the two sums of the usual gradient). Sums are in float64, as in torch's own CPU
    kernel, and pixels are computed by its formulas: a random deep network multiplies a difference
    in the last digit a thousandfold from input to loss.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        local_count = x.numel() // x.shape[1]
        local_mean = x.sum(dim=(0, 2, 3), dtype=torch.float64) / local_count
        around = local_mean.to(x.dtype)
        squares = (x - _spread(around)).square_().sum(dim=(0, 2, 3), dtype=torch.float64)
        local_var = squares / local_count - (local_mean - around) ** 2
        workers = dist.get_world_size(group)
        mine = torch.stack([local_mean, local_var])
        gathered = [torch.empty_like(mine) for _ in range(workers)]
        dist.all_gather(gathered, mine, group=group)
        every = torch.stack(gathered)  # [s, 2, C]
        mean = every[:, 0].mean(dim=0)
        variance = (every[:, 1] + (every[:, 0] - mean) ** 2).mean(dim=0)
        inverse_std = torch.rsqrt(variance + eps)
        mean_x, inverse_std_x = mean.to(x.dtype), inverse_std.to(x.dtype)
        factor = inverse_std_x * weight
        out = x * _spread(factor) + _spread(bias - mean_x * factor)
        ctx.save_for_backward(x, weight, mean_x, inverse_std_x)
        ctx.group, ctx.count = group, local_count * workers
        mean_out, variance_out = mean.to(weight.dtype), variance.to(weight.dtype)
        ctx.mark_non_differentiable(mean_out, variance_out)
        return out, mean_out, variance_out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        gradient, centred = gradients[0], x - _spread(mean)
        grad_bias = gradient.sum(dim=(0, 2, 3), dtype=torch.float64)
        product = (gradient * centred).sum(dim=(0, 2, 3), dtype=torch.float64)
        sums = torch.stack([grad_bias, product])
        dist.all_reduce(sums, group=ctx.group)
        mean_gradient, mean_product = sums / ctx.count
        slope = (mean_product * inverse_std.double() ** 2).to(x.dtype)
        grad_x = (
            gradient - _spread(mean_gradient.to(x.dtype)) - centred * _spread(slope)
        ) * _spread(inverse_std * weight)
        # Weight and bias keep their local sums: the gradient reduction adds the workers up.
        grad_weight = (product * inverse_std).to(weight.dtype)
        return grad_x, grad_weight, grad_bias.to(weight.dtype), None, None


def _spread(values: Tensor) -> Tensor:
    """[C] -> [1, C, 1, 1]"""
    return values.view(1, -1, 1, 1)


def synchronise(module: nn.Module, plan: BatchPlan, rank: int, device: torch.device) -> nn.Module:
    """Replace the batch norms of `module` if its groups are shared. Collective: all ranks call it."""
    if plan.team == 1:
        return module
    own: dist.ProcessGroup | None = None
    for first in range(0, plan.world_size, plan.team):
        members = list(range(first, first + plan.team))
        group = dist.new_group(members)
        if rank in members and isinstance(group, dist.ProcessGroup):
            own = group
    assert own is not None
    if device.type == "cuda":
        return cast(nn.Module, convert_sync_batchnorm(module, process_group=own))
    return _convert(module, own)


def _convert(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            activation = getattr(child, "act", None) or nn.Identity()
            new = TeamBatchNorm2d(child.num_features, activation=activation, group=group)
            new.momentum, new.eps = child.momentum, child.eps
            new.load_state_dict(child.state_dict())
            new.to(child.weight.device)
            setattr(module, name, new)
        else:
            _convert(child, group)
    return module


class RunningStatistics:
    """Makes the running statistics of a step the average over its groups.

    Without it, groups of a step would be blended in one after another, and each worker would know
    only its own.
    """

    def __init__(self, module: nn.Module, plan: BatchPlan) -> None:
        self.plan = plan
        layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.buffers = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
        self.idle = plan.num_groups == 1
        self.before: list[Tensor] = []
        self.sums: list[Tensor] = []

    @torch.no_grad()
    def begin_step(self) -> None:
        if self.idle:
            return
        self.before = [b.clone() for b in self.buffers]
        self.sums = [torch.zeros_like(b) for b in self.buffers]

    @torch.no_grad()
    def end_shard(self) -> None:
        """After each forward pass: remember what it gave, start the next from the same place."""
        if self.idle:
            return
        torch._foreach_add_(self.sums, self.buffers)
        torch._foreach_copy_(self.buffers, self.before)

    @torch.no_grad()
    def end_step(self) -> None:
        if self.idle:
            return
        flat = torch.cat([s.flatten() for s in self.sums])
        if self.plan.world_size > 1:
            dist.all_reduce(flat)
        flat /= self.plan.num_groups * self.plan.team
        parts = flat.split([b.numel() for b in self.buffers])
        torch._foreach_copy_(self.buffers, list(parts))
