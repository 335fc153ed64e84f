"""A compiled network trains like the plain one, as one graph that is compiled once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.loop import dataset, recipe
from torch._dynamo.utils import counters

from model.data.dataset import collate
from model.data.sampler import plan_batch
from model.network.detector import Detector
from model.training.step import Schedule, Trainee

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]


def test_compiled_training(tmp_path: Path) -> None:
    """The same losses to 1e-4 over 6 steps of fresh batches; no graph break, no recompilation."""
    torch._dynamo.reset()
    counters.clear()
    data = dataset(tmp_path / "shapes")

    def losses(compile_network: bool) -> list[float]:
        torch.manual_seed(0)
        asked = recipe(batch_size=4, bn_group=4, compile=compile_network)
        trainee = Trainee(
            Detector(asked.network), asked, plan_batch(4, 4, 1), 0, torch.device("cpu")
        )
        schedule = Schedule.of(asked, len(data))
        found = []
        for step in range(6):
            batch = collate(
                [data[(step, image)] for image in range(4 * (step % 6), 4 * (step % 6) + 4)]
            )
            found.append(float(trainee.step(step, schedule, [batch])[0]))
        return found

    plain = losses(False)
    assert losses(True) == pytest.approx(plain, rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
