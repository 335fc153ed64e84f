"""Schedule, weight decay groups, moving average, durations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from model.errors import ConfigError
from model.network.fusion import FastFusion
from model.training.config import Duration, OptimConfig
from model.training.optim import Ema, build_optimizer, learning_rate


def rate(step: int, batch_size: int = 64) -> float:
    config = OptimConfig(lr_per_64=0.08, warmup_from=0.1)
    return learning_rate(step, config, batch_size=batch_size, warmup_steps=10, total_steps=110)


def test_schedule_by_hand() -> None:
    assert rate(0) == pytest.approx(0.008)
    assert rate(5) == pytest.approx(0.008 + 0.072 / 2)
    assert rate(10) == pytest.approx(0.08)
    assert rate(60) == pytest.approx(0.04)  # half of the cosine, which starts after warm-up
    assert rate(110) == pytest.approx(0.0, abs=1e-12)
    after = [rate(step) for step in range(10, 111)]
    assert after == sorted(after, reverse=True)  # never rises again


def test_rate_follows_the_global_batch() -> None:
    assert rate(10, batch_size=128) == pytest.approx(0.16)


def test_weight_decay_is_for_convolution_kernels_only() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), FastFusion(3))
    decayed, free = build_optimizer(net, OptimConfig()).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3, 3, 3)]
    assert decayed["weight_decay"] == 4e-5
    assert free["weight_decay"] == 0.0
    assert len(free["params"]) == 4  # conv bias, norm weight and bias, fusion weights


def test_average_ramps_up_and_covers_buffers() -> None:
    net = nn.BatchNorm2d(1)
    ema = Ema(copy.deepcopy(net), net, decay=0.9998)
    with torch.no_grad():
        net.weight.fill_(3.0)
    assert net.running_mean is not None
    net.running_mean.fill_(2.0)
    ema.update(0)  # decay (1 + 0) / (10 + 0)
    assert float(ema.module.weight) == pytest.approx(0.1 * 1.0 + 0.9 * 3.0)
    assert float(ema.module.running_mean) == pytest.approx(0.9 * 2.0)
    ema.update(8)  # decay 9 / 18
    assert float(ema.module.weight) == pytest.approx(0.5 * 2.8 + 0.5 * 3.0)
    assert not ema.module.training


@pytest.mark.parametrize(
    ("duration", "steps"),
    [(Duration(epochs=2), 20), (Duration(epochs=0.25), 2), (Duration(steps=7), 7)],
)
def test_durations(duration: Duration, steps: int) -> None:
    assert duration.to_steps(10, "train.duration") == steps


@pytest.mark.parametrize("duration", [Duration(), Duration(epochs=1, steps=1), Duration(steps=0)])
def test_bad_durations(duration: Duration) -> None:
    with pytest.raises(ConfigError, match=r"train\.duration: expected"):
        duration.to_steps(10, "train.duration")
