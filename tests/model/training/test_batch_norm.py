"""Batch norm shared by workers equals batch norm of one worker with all images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.loop import recipe
from torch import nn

from model.data.sampler import BatchPlan
from model.network.detector import Detector
from model.training.batch_norm import TeamBatchNorm2d, synchronise
from model.training.benchmark import num_batch_norm_exchanges

pytestmark = pytest.mark.integration


def network() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-3, momentum=0.2), nn.SiLU())
    nn.init.uniform_(net[1].weight)
    return net


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    # A large mean over a small spread: the case in which E[x^2] - E[x]^2 loses all digits.
    return 100 + 0.1 * torch.randn(4, 3, 6, 6, generator=generator)


def step(net: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    out = net(batch)
    (out * torch.linspace(-1, 1, out[0].numel()).view_as(out[0])).sum().backward()
    found = {f"grad.{name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return found | {name: b for name, b in net.named_buffers() if b.is_floating_point()}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    plan = BatchPlan(batch_size=4, group_size=4, world_size=2, team=2)
    net = synchronise(network(), plan, rank, torch.device("cpu"))
    assert isinstance(net.get_submodule("1"), TeamBatchNorm2d)
    found = step(net, images()[2 * rank : 2 * rank + 2])
    torch.save(found, f"{folder}/{rank}.pt")
    net.eval()
    torch.save(net(images()), f"{folder}/eval{rank}.pt")
    dist.destroy_process_group()


def _count_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    plan = BatchPlan(batch_size=4, group_size=4, world_size=2, team=2)
    torch.manual_seed(0)
    detector = Detector(recipe().network)
    expected = num_batch_norm_exchanges(detector)
    shared = synchronise(detector, plan, rank, torch.device("cpu")).train()
    calls = {"all_gather": 0, "all_reduce": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            original = getattr(dist, name)

            def counted(*args: Any, _name: str = name, _call: Any = original, **kwargs: Any) -> Any:
                calls[_name] += 1
                return _call(*args, **kwargs)

            patch.setattr(dist, name, counted)
        out = shared(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
        (out[0].sum() + out[1].sum()).backward()
    assert calls == {"all_gather": expected, "all_reduce": expected}
    dist.destroy_process_group()


def test_levels_of_a_head_exchange_together(tmp_path: Path) -> None:
    """As many collectives, forward and backward, as the benchmark's model of them says."""
    mp.spawn(_count_worker, args=(str(tmp_path),), nprocs=2)


def test_two_workers_equal_one(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    net = network()
    whole = step(net, images())
    for name, value in whole.items():
        if name.startswith("grad."):
            torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=2e-3, atol=2e-3)
        else:
            for part in parts:
                torch.testing.assert_close(part[name], value, rtol=1e-5, atol=1e-5)
    net.eval()
    torch.testing.assert_close(
        torch.load(tmp_path / "eval1.pt"), net(images()), rtol=1e-4, atol=1e-4
    )
