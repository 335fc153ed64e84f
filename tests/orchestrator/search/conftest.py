"""A made-up sweep: 48 trials over four knobs, stopped by ASHA, with known truth."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model.network.footprint import network_cost
from model.network.scaling import resolve
from orchestrator.config.schema import TrainJob
from orchestrator.search.sample import apply, arm_key
from orchestrator.search.space import Space, read_space
from orchestrator.search.trial import State, TrialRecord

KNOBS: dict[str, Any] = {
    "model.fusion": {"choice": ["fast", "softmax", "unbounded", "sum"]},
    "model.scaling.width": {"choice": [1.2, 1.25, 1.3, 1.35, 1.4, 1.45]},
    "model.scaling.depth": {"choice": [-1, 0, 1]},
    "optim.lr_per_64": {"loguniform": [0.02, 0.2]},
}
RUNGS = (2.0, 6.0, 18.0)
LONGEST = 54.0
Curves = dict[str, list[tuple[float, float]]]


@pytest.fixture(scope="session")
def space() -> Space:
    return read_space(KNOBS)


@pytest.fixture(scope="session")
def base() -> TrainJob:
    return apply(TrainJob(), {"model.phi": "1"})


def truth(sample: dict[str, Any]) -> float:
    """AP at the end: learning rate first, then width, hardly fusion, not depth."""
    away = math.log(sample["optim.lr_per_64"] / 0.09)
    wide = sample["model.scaling.width"] - 1.2
    fused = 0.004 if sample["model.fusion"] == "fast" else 0.0
    return 0.40 - 0.035 * away**2 + 0.10 * wide + fused


@pytest.fixture(scope="session")
def sweep(space: Space, base: TrainJob) -> tuple[list[TrialRecord], Curves]:
    return made_sweep(space, base)


def made_sweep(space: Space, base: TrainJob, num: int = 48) -> tuple[list[TrialRecord], Curves]:
    """The better third goes on at each rung; trial 7 diverged."""
    noise = np.random.default_rng(0)
    samples = [space.sample(3, i) for i in range(num)]
    ends = [truth(sample) + float(noise.normal(0, 0.003)) for sample in samples]
    order = sorted(range(num), key=lambda i: -ends[i])
    records: list[TrialRecord] = []
    curves: Curves = {}
    for i, sample in enumerate(samples):
        rank, stop = order.index(i), LONGEST
        for depth, rung in enumerate(RUNGS):
            if rank >= num / 3 ** (depth + 1):
                stop = rung
                break
        state: State = "finished" if stop == LONGEST else "stopped"
        state = "failed" if i == 7 else state
        job = apply(base, sample)
        cost = network_cost(resolve(job.model, 80))
        steps = np.arange(1, int(stop) + 1)
        height = ends[i] * (1 - 0.75 * np.exp(-steps / 7))
        curve = list(zip(steps.tolist(), height.tolist(), strict=True))
        trial_id = f"{i:02d}"
        curves[trial_id] = curve
        value = math.nan if state == "failed" else float(height[-1])
        record = TrialRecord(trial_id, arm_key(apply(base, sample)), sample, 0, state)
        records.append(
            replace(
                record,
                reason="loss nan at step 212" if state == "failed" else "",
                best={"val/AP": value},
                last={"val/AP": value},
                step=int(stop) * 100,
                epoch=stop,
                num_params=cost.params,
                gmacs=cost.gmacs,
                seconds=stop * 60,
                worker_hours=stop / 60,
            )
        )
    return records, curves
