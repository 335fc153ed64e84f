"""The sweep's YAML: what it means, and one clear line for everything it cannot mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from model.training.config import Duration
from model.training.evaluation import METRICS
from orchestrator.config.codec import merge, nest
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError
from orchestrator.search.config import (
    SchedulerConfig,
    check_objectives,
    decode_sweep,
    known_metrics,
    read_sweep,
)
from orchestrator.search.constraints import Band, ConstraintsConfig
from orchestrator.search.trial import Objective

DESIGN = """
name: fusion-scaling
train: ../configs/coco.yaml
objective: {metric: val/AP, mode: max}
trials: {num: 48, concurrent: auto, workers_per_trial: 4, max_failures: 2, seeds: 1}
search: {algorithm: tpe, seed: 7}
scheduler: {kind: asha, unit: epoch, grace: 8, max: 60, reduction: 3}
space:
  model.fusion: {choice: [fast, softmax, unbounded, sum]}
  model.scaling.width: {choice: [1.2, 1.25, 1.3, 1.35, 1.4, 1.45]}
  model.scaling.depth: {choice: [-1, 0, 1]}
  optim.lr_per_64: {loguniform: [0.02, 0.2]}
constraints: {max_params_m: 15, gmacs: {target: 6.1, tolerance: 0.1}}
keep: {best_of_sweep: 3, best_of_trial: 1, latest_of_trial: 1}
"""
SMALL: dict[str, Any] = {
    "train": {"train": {"duration": {"epochs": 300}}},
    "objective": {"metric": "val/AP"},
    "trials": {"num": 4},
    "space": {
        "model.fusion": {"choice": ["fast", "sum"]},
        "optim.lr_per_64": {"loguniform": [0.02, 0.2]},
    },
}


def small(path: str, value: Any) -> dict[str, Any]:
    """SMALL with one setting changed."""
    return merge(SMALL, nest(path, value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "configs" / "coco.yaml").write_text(
        'model: {phi: "1"}\ntrain: {duration: {epochs: 300}}\n'
    )
    return tmp_path


def test_the_example_of_the_design_is_read(folder: Path) -> None:
    path = folder / "sweeps" / "fusion_scaling.yaml"
    path.write_text(DESIGN)
    sweep = read_sweep(path)
    assert (sweep.name, sweep.base.model.phi) == ("fusion-scaling", "1")
    assert sweep.objectives == (Objective("val/AP", "max"),)
    assert (sweep.trials.num, sweep.trials.concurrent, sweep.trials.workers_per_trial) == (48, None, 4)  # fmt: skip
    assert (sweep.search.algorithm, sweep.search.seed) == ("tpe", 7)
    assert sweep.scheduler == SchedulerConfig("asha", "epoch", 8, 60, 3)
    assert sweep.scheduler.rungs(60) == (8, 24)
    assert sweep.constraints == ConstraintsConfig(15, Band(target=6.1, tolerance=0.1))
    assert [d.path for d in sweep.space.dimensions] == [
        "model.fusion", "model.scaling.width", "model.scaling.depth", "optim.lr_per_64"
    ]  # fmt: skip
    assert sweep.notes() == []


def test_a_sweep_is_read_back_from_what_is_kept_of_it(folder: Path) -> None:
    point = {"model.fusion": "sum", "optim.lr_per_64": "5e-2"}
    several = merge(
        SMALL,
        {
            "trials": {"concurrent": 3, "seeds": 5},
            "search": {"points": [point]},
            "objective": [{"metric": "val/AP"}, {"metric": "model/gmacs"}],
        },
    )
    path = folder / "sweeps" / "s.yaml"
    path.write_text(DESIGN)
    for sweep in (read_sweep(path), decode_sweep(several)):
        text = yaml.safe_dump(sweep.to_mapping(), sort_keys=False)
        assert decode_sweep(yaml.safe_load(text)) == sweep


def test_what_is_left_out_has_a_plain_meaning() -> None:
    sweep = decode_sweep(SMALL, name="stem")
    assert sweep.name == "stem"
    assert (sweep.scheduler.kind, sweep.search.algorithm, sweep.trials.seeds) == ("none", "random", 1)  # fmt: skip
    assert sweep.longest() == 300
    objectives = decode_sweep(small("objective", [{"metric": "val/AP"}, {"metric": "model/gmacs"}]))
    assert [objective.mode for objective in objectives.objectives] == ["max", "min"]
    grid = {**SMALL, "search": {"algorithm": "grid"}, "trials": {}, "space": {"model.fusion": {"choice": ["fast", "sum"]}}}  # fmt: skip
    assert decode_sweep(grid).trials.num is None


def test_known_points_are_typed() -> None:
    points = [{"model.fusion": "sum", "optim.lr_per_64": "5e-2"}]
    assert decode_sweep(small("search.points", points)).search.points == (
        {"model.fusion": "sum", "optim.lr_per_64": 0.05},
    )


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (small("objectve", 1), "objectve: expected a known key, got 'objectve'; did you mean 'objective'"),
    (small("trials.nmu", 1), r"trials\.nmu: .* did you mean 'num'"),
    (small("trials.concurrent", "all"), r"trials\.concurrent: expected a whole number, got 'all'"),
    (small("trials.num", 0), r"trials\.num: expected at least 1, got 0"),
    (small("trials.num", None), r"trials\.num: expected a number of trials for random, got nothing"),
    (small("trials.seeds", 0), r"trials\.seeds: expected at least 1"),
    (small("trials", 3), "trials: expected a mapping, got 3"),
    (small("keep.latest_of_trial", 0), r"keep\.latest_of_trial: expected at least 1"),
    (small("name", 7), "name: expected text, got 7"),
    (small("search.algorithm", "bayes"), r"search\.algorithm: expected one of random, grid, tpe, got 'bayes'"),
    (small("search.algorithm", "grid"), r"space\.optim\.lr_per_64: .*for a grid, got a continuous range"),
    (small("search.points", [{"model.fusion": "fast"}]), r"search\.points\[0\]\.optim\.lr_per_64: expected a value"),
    (small("search.points", {"a": 1}), r"search\.points: expected a list"),
    (small("scheduler.kind", "hyperband"), r"scheduler\.kind: expected one of asha, median, pbt, none"),
    (small("scheduler.unit", "epochs"), "did you mean 'epoch'"),
    (small("scheduler", {"kind": "asha", "grace": 60, "max": 60}), r"scheduler\.grace: expected less than the 60 epochs of a trial, got 60"),
    (small("scheduler", {"kind": "asha", "max": 301}), r"scheduler\.max: expected at most train\.duration, 300 epochs, got 301"),
    (small("scheduler", {"kind": "asha", "unit": "step"}), r"scheduler\.max: expected a number of steps, got nothing"),
    (small("scheduler", {"kind": "asha", "reduction": 1}), r"scheduler\.reduction: expected more than 1"),
    (small("scheduler.grace", 0), r"scheduler\.grace: expected more than 0"),
    (small("scheduler", {"kind": "pbt"}), r"space\.model\.fusion: expected a knob of optim\.\*"),
    (merge(small("scheduler", {"kind": "pbt"}), {"search": {"algorithm": "tpe"}}), r"search\.algorithm: expected random with pbt"),
    (merge(small("scheduler", {"kind": "pbt"}), {"trials": {"seeds": 2}}), r"trials\.seeds: expected 1 with pbt"),
    (merge(small("scheduler", {"kind": "pbt"}), {"objective": [{"metric": "val/AP"}, {"metric": "model/gmacs"}]}), "objective: expected one metric with pbt"),
    (small("objective", None), "objective: expected .* got nothing"),
    (small("objective", {"metric": "val/mAP"}), r"objective\.metric: expected a metric that is reported \(val/AP, .*model/gmacs.*\), got 'val/mAP'; did you mean 'val/AP"),
    (small("objective", {"metric": "AP"}), "did you mean"),
    (small("objective", [{"metric": "val/AP"}, {"metric": "val/AP"}]), r"objective\[1\]\.metric: expected each metric once"),
    (small("objective", {"metric": "model/gmacs"}), "objective: expected a val/… metric first"),
    (small("objective", {"metric": "val/AP", "mode": "maximum"}), r"objective\.mode: expected one of max, min"),
    ({**SMALL, "objective": {"mode": "max"}}, "name a metric"),
    ({**SMALL, "space": {}}, "space: expected at least one knob"),
    ({**SMALL, "space": {"model.fusion": {"choice": ["fast", "sum"]}}}, r"trials\.num: expected at most the 2 points of the space, got 4"),
    (small("constraints.gmac", {"max": 1}), r"constraints\.gmac: .*did you mean 'gmacs'"),
    (small("constraints.max_params_m", -1), "a positive number"),
    ({**SMALL, "train": None}, "train: expected a train YAML or a mapping, got nothing"),
    ({**SMALL, "train": [1]}, "train: expected a train YAML or a mapping"),
    (small("train.modle", {}), r"train\.modle: .*did you mean 'model'"),
    (small("train.train.batch_size", "big"), r"train\.train\.batch_size: expected a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), MISTAKES)
def test_a_mistake_is_one_clear_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        decode_sweep(given)
    assert "\n" not in str(caught.value)


def test_a_missing_train_file_suggests_the_nearest(folder: Path) -> None:
    path = folder / "sweeps" / "s.yaml"
    path.write_text(DESIGN.replace("coco.yaml", "coc.yaml"))
    with pytest.raises(ConfigError, match=r"train: .*did you mean '\.\./configs/coco\.yaml'"):
        read_sweep(path)


def test_pbt_takes_what_leaves_the_weights_their_shapes() -> None:
    space = {"optim.lr_per_64": {"loguniform": [0.02, 0.2]}, "model.fusion": {"value": "sum"}}
    given = {**SMALL, "space": space, "scheduler": {"kind": "pbt", "grace": 5}}
    assert decode_sweep(given).scheduler.kind == "pbt"


def test_the_ap_of_a_class_is_checked_once_the_classes_are_known() -> None:
    sweep = decode_sweep(small("objective", {"metric": "val_class/dog"}))
    check_objectives(sweep, ["cat", "dog"])
    with pytest.raises(ConfigError, match=r"objective\[0\]\.metric: .*did you mean 'val_class/doggy'"):  # fmt: skip
        check_objectives(sweep, ["cat", "doggy"])


def test_known_metrics_are_those_that_an_evaluation_reports() -> None:
    assert {f"val/{name}" for name in METRICS} < set(known_metrics())
    assert decode_sweep(SMALL).base.checkpoint.metric in known_metrics()


def test_notes_tell_what_early_stopping_is_known_to_reverse() -> None:
    jitter = {"data.augment.jitter_max": {"uniform": [1.2, 2.0]}}
    given = merge(SMALL, {"space": jitter, "scheduler": {"kind": "asha", "grace": 30}})
    (note,) = decode_sweep(given).notes()
    assert "data.augment.jitter_max" in note
    assert "figure 8" in note
    assert decode_sweep(merge(given, {"scheduler": {"grace": 100}})).notes() == []
    assert decode_sweep(merge(given, {"scheduler": {"kind": "none"}})).notes() == []
    two = {"objective": [{"metric": "val/AP"}, {"metric": "model/gmacs"}]}
    (note,) = decode_sweep(merge(SMALL, two | {"scheduler": {"kind": "asha"}})).notes()
    assert "Pareto front" in note


def test_rungs_end_before_the_end() -> None:
    asha = SchedulerConfig("asha", grace=2, reduction=3)
    assert asha.rungs(54) == (2, 6, 18)
    assert asha.rungs(18) == (2, 6)
    assert SchedulerConfig("median", grace=2).rungs(54) == ()


def test_duration_in_steps_bounds_a_scheduler_in_steps() -> None:
    steps = merge(SMALL, {"train": {"train": {"duration": {"steps": 90}}}})
    sweep = decode_sweep(merge(steps, {"scheduler": {"kind": "asha", "unit": "step", "grace": 10}}))
    assert sweep.base == TrainJob(train=sweep.base.train)
    assert sweep.base.train.duration == Duration(steps=90)
    assert sweep.longest() == 90
