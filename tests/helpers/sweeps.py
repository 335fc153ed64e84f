"""A sweep small enough for tests, and what it left."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from helpers import TINY
from helpers.jobs import Job
from orchestrator.config.codec import merge, nest
from orchestrator.search.training import PARENT

SWEEP: dict[str, Any] = {
    "name": "tiny",
    "objective": {"metric": "val/AR100", "mode": "max"},  # not all zero after a few steps
    "trials": {"num": 8},
    "search": {"algorithm": "random", "seed": 5},
    "space": {
        "model.fusion": {"choice": ["fast", "softmax", "sum"]},
        "model.fpn_channels": {"choice": [8, 16, 64]},
        "optim.lr_per_64": {"loguniform": [0.05, 0.5]},
    },
}


def write_sweep(folder: Path, **changes: Any) -> Path:
    """changes: by key; those of `train` by dotted path."""
    train: dict[str, Any] = {}
    settings = TINY | {
        "train.duration": "{epochs: 4}",
        "train.evaluate_every": "{epochs: 1}",
        "train.checkpoint_every": "{epochs: 1}",
        "tracking.system_metrics_every_s": "null",
        "model.phi": "'0'",
    }
    for path, text in (settings | changes.pop("train", {})).items():
        train = merge(train, nest(path, yaml.safe_load(str(text))))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "train": train, **changes}, sort_keys=False))
    return path


class SweepJob(Job):
    """jobs/tune.py in a process of its own."""

    script = "tune.py"

    def events(self) -> list[dict[str, Any]]:
        return events(self.output)

    def ended(self) -> int:
        return sum(event["op"] == "end" for event in self.events())


def events(output: Path) -> list[dict[str, Any]]:
    """Of the only sweep in an output folder."""
    found = list(output.glob("sweeps/*/trials.jsonl"))
    lines = found[0].read_text().splitlines() if found else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def count(found: list[dict[str, Any]], op: str) -> Counter[str]:
    """Events of a kind by trial."""
    return Counter(event["trial"] for event in found if event["op"] == op)


def children(client: MlflowClient, run_id: str) -> list[Run]:
    parent = client.get_run(run_id)
    found = client.search_runs(
        [parent.info.experiment_id], f"tags.`{PARENT}` = '{run_id}'", max_results=1000
    )
    return list(found)
