"""Optimiser, schedule, exponential moving average."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.training.config import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.SGD:
    """SGD; weight decay on convolution kernels only (no bias, batch norm or fusion weight)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.ndim == 4]
    others = [p for p in trained if p.ndim != 4]
    return torch.optim.SGD(
        [
            {"params": kernels, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.lr_per_64,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )


def learning_rate(
    step: int, config: OptimConfig, *, batch_size: int, warmup_steps: int, total_steps: int
) -> float:
    """Rate of the update that ends global step `step` (from 0): linear up, then cosine to 0.

    The cosine runs over the steps after warm-up. google/automl's runs from step 0 over the shorter
    span and so rises again at the end (`det_model_fn.py:86-89`).
    """
    peak = config.lr_per_64 * batch_size / 64
    if step < warmup_steps:
        share = step / warmup_steps
        return peak * (config.warmup_from + (1.0 - config.warmup_from) * share)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


class Ema:
    """Average of parameters and float buffers in a copy of the module, ready to evaluate.

    decay_n = min(decay, (1 + n) / (10 + n)) for the n-th update (TF's ramp).
    """

    def __init__(self, average: nn.Module, module: nn.Module, decay: float) -> None:
        """average: a copy of `module` (of the same names; its batch norms may be plain ones)."""
        self.module = average.eval().requires_grad_(False)
        self.decay = decay
        self._averages, self._values = list(_tensors(self.module)), list(_tensors(module))
        if [t.shape for t in self._averages] != [t.shape for t in self._values]:
            raise ValueError("the average must be a copy of the module")

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Move towards the module; num_updates: how many came before this one."""
        decay = min(self.decay, (1.0 + num_updates) / (10.0 + num_updates))
        torch._foreach_lerp_(self._averages, self._values, 1.0 - decay)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (p.detach() for p in module.parameters())
    yield from (b for b in module.buffers() if b.is_floating_point())
