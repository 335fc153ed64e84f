"""Batch norm over a fixed number of images, whoever holds them.

Shape legend: C channels, g images of a group, s workers that share it, G groups of a step.

A group's statistics are the recipe's, not the world size's. Whole groups need no traffic. A group
shared by a team of workers needs one exchange forward and one backward in every layer. Running
statistics then move once a step, by the average of the groups, in one small reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        return self.together([self], [x])[0]

    @staticmethod
    def together(layers: Sequence[TeamBatchNorm2d], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Layers that do not depend on one another share one exchange each way."""
        if not layers[0].training:
            plain = [
                nn.BatchNorm2d.forward(layer, x) for layer, x in zip(layers, inputs, strict=True)
            ]
            return [cast(Tensor, layer.act(x)) for layer, x in zip(layers, plain, strict=True)]
        affine = [p for layer in layers for p in (layer.weight, layer.bias)]
        found = cast(
            "tuple[Tensor, ...]",
            _TeamNormalise.apply(layers[0].eps, layers[0].group, len(layers), *inputs, *affine),
        )
        number = len(layers)
        outs, means, variances = found[:number], found[number : 2 * number], found[2 * number :]
        workers = dist.get_world_size(layers[0].group)
        with torch.no_grad():
            for layer, x, mean, variance in zip(layers, inputs, means, variances, strict=True):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                count = x.numel() // x.shape[1] * workers
                momentum = cast(float, layer.momentum)
                layer.running_mean.lerp_(mean, momentum)
                layer.running_var.lerp_(variance * (count / max(1, count - 1)), momentum)
        return [cast(Tensor, layer.act(out)) for layer, out in zip(layers, outs, strict=True)]


class _TeamNormalise(torch.autograd.Function):
    """(x - mean) / std * weight + bias with mean and variance of the whole team's images.

    For n layers at once: one exchange forward (each worker's sum and squares around its own mean,
    combined exactly) and one backward (the two sums of the usual gradient). Sums are in float64, as
    in torch's own CPU kernel, and pixels are computed by its formulas: a random deep network
    multiplies a difference in the last digit a thousandfold from input to loss.
    """

    @staticmethod
    def forward(
        ctx: Any, eps: float, group: dist.ProcessGroup, number: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        inputs, affine = tensors[:number], tensors[number:]
        workers = dist.get_world_size(group)
        local = []
        for x in inputs:
            count = x.numel() // x.shape[1]
            local_mean = x.sum(dim=(0, 2, 3), dtype=torch.float64) / count
            around = local_mean.to(x.dtype)
            squares = (x - _spread(around)).square_().sum(dim=(0, 2, 3), dtype=torch.float64)
            local.append(torch.stack([local_mean, squares / count - (local_mean - around) ** 2]))
        mine = torch.cat(local, dim=1)
        gathered = [torch.empty_like(mine) for _ in range(workers)]
        dist.all_gather(gathered, mine, group=group)
        every = torch.stack(gathered)  # [s, 2, sum of C]
        mean = every[:, 0].mean(dim=0)
        variance = (every[:, 1] + (every[:, 0] - mean) ** 2).mean(dim=0)
        inverse_std = torch.rsqrt(variance + eps)
        widths = [x.shape[1] for x in inputs]
        outs, kept = [], []
        for x, weight, bias, mean_, inverse in zip(
            inputs, affine[::2], affine[1::2], mean.split(widths), inverse_std.split(widths),
            strict=True,
        ):  # fmt: skip
            mean_x, inverse_x = mean_.to(x.dtype), inverse.to(x.dtype)
            factor = inverse_x * weight
            outs.append(x * _spread(factor) + _spread(bias - mean_x * factor))
            kept += [x, weight, mean_x, inverse_x]
        ctx.save_for_backward(*kept)
        ctx.group, ctx.workers = group, workers
        statistics = [
            value.to(weight.dtype)
            for values in (mean, variance)
            for value, weight in zip(values.split(widths), affine[::2], strict=True)
        ]
        ctx.mark_non_differentiable(*statistics)
        return (*outs, *statistics)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        number = len(kept) // 4
        rows = [kept[4 * i : 4 * i + 4] for i in range(number)]
        local = []
        for gradient, (x, _, mean, _) in zip(gradients[:number], rows, strict=True):
            total = gradient.sum(dim=(0, 2, 3), dtype=torch.float64)
            product = (gradient * (x - _spread(mean))).sum(dim=(0, 2, 3), dtype=torch.float64)
            local.append(torch.stack([total, product]))
        # Weight and bias keep their local sums: the gradient reduction adds the workers up.
        shared = torch.cat(local, dim=1)
        dist.all_reduce(shared, group=ctx.group)
        widths = [len(weight) for _, weight, _, _ in rows]
        for_inputs: list[Tensor] = []
        for_affine: list[Tensor] = []
        for gradient, (x, weight, mean, inverse_std), sums, mine in zip(
            gradients[:number], rows, shared.split(widths, dim=1), local, strict=True
        ):
            mean_gradient, mean_product = sums / (x.numel() // x.shape[1] * ctx.workers)
            slope = (mean_product * inverse_std.double() ** 2).to(x.dtype)
            for_inputs.append(
                (
                    gradient
                    - _spread(mean_gradient.to(x.dtype))
                    - (x - _spread(mean)) * _spread(slope)
                )
                * _spread(inverse_std * weight)
            )
            total, product = mine
            for_affine += [(product * inverse_std).to(weight.dtype), total.to(weight.dtype)]
        return (None, None, None, *for_inputs, *for_affine)


def _spread(values: Tensor) -> Tensor:
    """[C] -> [1, C, 1, 1]"""
    return values.view(1, -1, 1, 1)


def synchronise(module: nn.Module, plan: BatchPlan, rank: int, device: torch.device) -> nn.Module:
    """Replace the batch norms of `module` if its groups are shared. Collective: all ranks call it."""
    if plan.team == 1:
        return module
    if not any(isinstance(m, nn.BatchNorm2d) and m.training for m in module.modules()):
        return module  # everything is frozen
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
            if not child.training:  # frozen: nothing to share
                continue
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

    def __init__(self, module: nn.Module, plan: BatchPlan, *, recomputed: bool = False) -> None:
        """recomputed: the backward pass runs layers again, which must not count twice."""
        self.plan, self.recomputed = plan, recomputed
        layers = [
            m
            for m in module.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
        ]
        self.buffers = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
        self.idle = plan.num_groups == 1
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.sums: list[Tensor] = []

    @torch.no_grad()
    def begin_step(self) -> None:
        if self.idle:
            return
        self.before = [b.clone() for b in self.buffers]
        self.sums = [torch.zeros_like(b) for b in self.buffers]

    @torch.no_grad()
    def end_forward(self) -> None:
        """After each forward pass."""
        if self.recomputed:
            self.after = [b.clone() for b in self.buffers]

    @torch.no_grad()
    def end_shard(self) -> None:
        """After each backward pass: remember what forward gave, start the next from the same place."""
        if self.recomputed:
            torch._foreach_copy_(self.buffers, self.after)
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
