"""The benchmark measures what it says, and its prediction follows from its inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.loop import dataset, recipe
from torch import nn

from model.data.dataset import collate
from model.network.detector import Detector
from model.network.footprint import network_cost
from model.training.benchmark import (
    _Traffic,
    ceilings,
    measure,
    num_batch_norm_exchanges,
    step_traffic,
)
from model.training.weak_scaling import BUCKET_BYTES, Link, Traffic, measure_two_workers, predict

CPU = torch.device("cpu")


def test_every_part_is_measured(tmp_path: Path) -> None:
    asked = recipe(batch_size=4)
    report = measure(asked, dataset(tmp_path / "shapes"), CPU, rounds=3)
    parts = ["to device", "match", "forward", "loss", "backward", "clip", "optimizer", "ema"]
    assert list(report.seconds) == parts
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert 0.2 < sum(report.seconds.values()) / report.step_s < 5
    assert report.img_per_s == pytest.approx(4 / report.step_s)
    flops = 6 * network_cost(asked.network).total.macs * 4
    assert report.tflop_per_s == pytest.approx(flops / report.step_s / 1e12)
    assert 0 <= report.data_wait_share < 1
    assert 0 < report.postprocess_share < 1
    weights = 4 * network_cost(asked.network).params
    assert 3 * weights < report.checkpoint_bytes < 6 * weights  # weights, average, momentum
    assert report.peak_memory_bytes > 2**27


def test_ceilings_are_above_what_simple_work_reaches() -> None:
    found = ceilings(CPU, torch.float32, rounds=3)
    assert found.tflop_per_s > 0.001
    assert found.gb_per_s > 0.5


def test_traffic_by_hand() -> None:
    """A product of [4, 8] and [8, 2] reads 32 + 16 and writes 8 values; a view moves nothing."""
    with torch.device("meta"), _Traffic() as traffic:
        a, b = torch.empty(4, 8), torch.empty(8, 2)
        traffic.bytes = 0
        torch.mm(a, b).view(-1)
    assert traffic.bytes == 4 * (32 + 16 + 8)


def test_traffic_of_a_step_grows_with_the_image() -> None:
    spec = recipe().network
    small = step_traffic(spec, half_precision=False)
    large = step_traffic(replace(spec, image_size_px=2 * spec.image_size_px), half_precision=False)
    assert step_traffic(spec, half_precision=True) == pytest.approx(small / 2, rel=0.01)
    assert 3 < large / small < 4.1  # weights are read once whatever the size


LINK = Link(latency_s=1e-4, bytes_per_s=1e9)


def prediction(workers: int, **changes: object) -> object:
    arguments: dict[str, object] = {
        "images_per_worker": 8, "compute_s": 0.3, "backward_s": 0.2,
        "traffic": Traffic(4 * BUCKET_BYTES, {"positives": 1}), "link": LINK,
    }  # fmt: skip
    return predict(workers=workers, **(arguments | changes))  # type: ignore[arg-type]


def test_one_worker_talks_to_nobody() -> None:
    alone = prediction(1)
    assert (alone.step_s, alone.efficiency, alone.dominant) == (0.3, 1.0, "compute")


def test_two_workers_by_hand() -> None:
    """25 MiB at 1 GB/s is 26.2 ms; three buckets hide behind 200 ms of backward, the last cannot."""
    pair = prediction(2)
    assert pair.terms["gradients"] == pytest.approx(0.0262 + 1e-4, rel=0.01)
    assert pair.terms["positives"] == pytest.approx(1e-4, rel=0.02)
    assert pair.step_s == pytest.approx(0.3 + sum(pair.terms.values()))
    assert pair.dominant == "gradients"
    assert pair.img_per_s == pytest.approx(16 / pair.step_s)


def test_a_slow_link_cannot_be_hidden() -> None:
    slow = prediction(2, link=replace(LINK, bytes_per_s=1e8))
    assert slow.terms["gradients"] > 0.2 + 0.26
    assert slow.efficiency < 0.45


def test_synchronised_batch_norm_is_what_kills_weak_scaling() -> None:
    """150 layers, two collectives each, only among the few that share a group."""
    traffic = Traffic(4 * BUCKET_BYTES, {"positives": 1, "batch norm": 300})
    few = prediction(64, traffic=traffic, team=2)
    all_of_them = prediction(64, traffic=traffic, team=64)
    assert all_of_them.dominant == "batch norm"
    assert all_of_them.terms["batch norm"] == pytest.approx(63 * few.terms["batch norm"], rel=0.05)


def test_traffic_counts_the_networks_layers() -> None:
    asked = recipe()
    detector = Detector(asked.network)
    layers = sum(isinstance(m, nn.BatchNorm2d) for m in detector.modules())
    assert num_batch_norm_exchanges(detector) == layers - 2 * 3  # 2 heads of 1 layer, 4 levels
    traffic = Traffic.of(asked, detector, team=2, num_groups=4)
    assert traffic.gradient_bytes == 4 * network_cost(asked.network).params
    assert traffic.small == {
        "positives": 1, "batch norm": 2 * num_batch_norm_exchanges(detector), "running statistics": 1,
    }  # fmt: skip


@pytest.mark.integration
def test_two_real_workers(tmp_path: Path) -> None:
    data = dataset(tmp_path / "shapes")
    batch = collate([data[(0, image)] for image in range(4)])
    measured = measure_two_workers(recipe(batch_size=4, bn_group=4), batch, rounds=3)
    assert 0 < measured.link.latency_s < 1
    assert measured.link.bytes_per_s > 1e6
    assert measured.alone_s > 0
    assert measured.together_s > 0
