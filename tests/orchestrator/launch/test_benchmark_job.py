from __future__ import annotations

import io
from dataclasses import replace

import pytest

from orchestrator.config.cli import BenchmarkOptions
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError
from orchestrator.launch.benchmark_job import run_benchmark_job


def test_what_is_asked_is_what_is_measured(job: TrainJob) -> None:
    """Recomputation too: a setting that changed nothing would make a benchmark lie."""
    out = io.StringIO()
    again = replace(
        job,
        train=replace(job.train, checkpoint_activations="yes"),
        launch=replace(job.launch, gpus_per_worker=0),
    )
    found = run_benchmark_job(again, BenchmarkOptions(rounds=1, json=True), out).report
    assert found["img_per_s"] == pytest.approx(4 / found["step_s"])
    assert "activations computed again" in out.getvalue()
    assert found["status"] == "finished"


@pytest.mark.parametrize(
    ("changes", "options", "where"),
    [
        ({"batch_size": 99}, {}, "train.batch_size"),
        ({}, {"rounds": 0}, "--rounds"),
        ({}, {"model_scale": 0}, "--model-scale"),
    ],
)
def test_refusals(
    job: TrainJob, changes: dict[str, int], options: dict[str, int], where: str
) -> None:
    asked = replace(job, train=replace(job.train, **changes))
    with pytest.raises(ConfigError) as caught:
        run_benchmark_job(asked, BenchmarkOptions(**({"rounds": 1, "json": False} | options)))
    assert caught.value.where == where
