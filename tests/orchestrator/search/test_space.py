"""Domains, conditions, grids and samples against enumeration and counting by hand."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from model.training.config import Duration
from orchestrator.config.codec import decode, encode, flatten
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError
from orchestrator.search.sample import apply, arm_key, changed, with_seed
from orchestrator.search.space import Sample, known_paths, read_space

CONDITIONAL: dict[str, Any] = {
    "model.scaling.head": {"choice": [0, 1, 2], "when": {"model.fusion": "fast"}},
    "model.topology": {"choice": ["bifpn", "fpn", "panet"]},
    "model.fusion": {"choice": ["fast", "softmax"], "when": {"model.topology": ["bifpn", "panet"]}},
    "model.scaling.resolution": {"quniform": [384, 640, 128]},
    "train.batch_size": {"randint": [8, 11]},
    "optim.momentum": {"value": 0.8},
}


def brute_force(space: dict[str, Any]) -> set[str]:
    """Every combination of every value, inactive knobs then dropped until nothing changes."""
    listed = {
        "model.scaling.head": [0, 1, 2], "model.topology": ["bifpn", "fpn", "panet"],
        "model.fusion": ["fast", "softmax"], "model.scaling.resolution": [384, 512, 640],
        "train.batch_size": [8, 9, 10, 11], "optim.momentum": [0.8],
    }  # fmt: skip
    found = set()
    for values in itertools.product(*listed.values()):
        sample = dict(zip(listed, values, strict=True))
        if sample["model.topology"] == "fpn":
            del sample["model.fusion"]
        if sample.get("model.fusion") != "fast":
            del sample["model.scaling.head"]
        found.add(json.dumps(sample, sort_keys=True))
    return found


def test_grid_with_conditions_is_every_combination_once() -> None:
    space = read_space(CONDITIONAL)
    grid = [json.dumps(sample, sort_keys=True) for sample in space.grid()]
    assert set(grid) == brute_force(CONDITIONAL)
    assert len(grid) == len(set(grid)) == space.size() == (2 * (3 + 1) + 1) * 3 * 4


def test_size_of_a_large_grid_is_counted_without_walking_it() -> None:
    many = {
        "model.scaling.width": {"quniform": [1.0, 2.0, 0.001]},
        "train.batch_size": {"randint": [1, 10**6]},
        "model.scaling.head": {"randint": [1, 10**6], "when": {"model.fusion": "sum"}},
        "model.fusion": {"choice": ["sum", "fast", "softmax"]},
    }
    assert read_space(many).size() == 1001 * 10**6 * (10**6 + 2)


def test_random_samples_reach_the_whole_grid_and_nothing_else() -> None:
    space = read_space(CONDITIONAL)
    drawn = {json.dumps(space.sample(1, i), sort_keys=True) for i in range(3000)}
    assert drawn == brute_force(CONDITIONAL)


def test_a_sample_depends_on_seed_number_and_path_alone() -> None:
    space = read_space(CONDITIONAL)
    assert space.sample(7, 3) == space.sample(7, 3)
    assert [space.sample(7, i) for i in range(20)] != [space.sample(8, i) for i in range(20)]
    wider = read_space({"optim.lr_per_64": {"uniform": [0, 1]}} | CONDITIONAL)
    for i in range(20):
        with_more = wider.sample(7, i)
        del with_more["optim.lr_per_64"]
        assert with_more == space.sample(7, i)


def test_a_sample_is_the_same_on_every_machine() -> None:
    space = read_space({"optim.lr_per_64": {"loguniform": [0.02, 0.2]}})
    assert [space.sample(7, i)["optim.lr_per_64"] for i in range(3)] == [
        0.0833605, 0.146039, 0.11545
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("domain", "cdf"),
    [
        ({"uniform": [0.1, 0.5]}, lambda x: (x - 0.1) / 0.4),
        ({"loguniform": ["1e-3", 0.1]}, lambda x: np.log(x / 1e-3) / np.log(100)),
    ],
)
def test_ranges_are_drawn_as_they_say(domain: dict[str, Any], cdf: Any) -> None:
    space = read_space({"optim.lr_per_64": domain})
    drawn = [space.sample(0, i)["optim.lr_per_64"] for i in range(2000)]
    assert stats.kstest(drawn, cdf).pvalue > 0.01
    assert all(len(f"{value:.12g}".strip("0.").replace(".", "")) <= 8 for value in drawn)


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        ({"randint": [8, 11]}, [8, 9, 10, 11]),
        ({"quniform": [8, 64, 28]}, [8, 36, 64]),
        ({"choice": [8, 4]}, [8, 4]),
    ],
)
def test_finite_domains_are_drawn_evenly_both_ends_included(
    domain: dict[str, Any], values: list[int]
) -> None:
    space = read_space({"train.batch_size": domain})
    counts = Counter(space.sample(0, i)["train.batch_size"] for i in range(2000))
    assert sorted(counts) == sorted(values)
    assert stats.chisquare(list(counts.values())).pvalue > 0.01


def test_steps_of_a_fraction_are_the_numbers_one_writes() -> None:
    space = read_space({"model.scaling.width": {"quniform": [1.2, 1.45, 0.05]}})
    values = [sample["model.scaling.width"] for sample in space.grid()]
    assert values == [1.2, 1.25, 1.3, 1.35, 1.4, 1.45]


def test_phi_counts_as_the_name_that_it_is() -> None:
    assert [s["model.phi"] for s in read_space({"model.phi": {"randint": [0, 2]}}).grid()] == ["0", "1", "2"]  # fmt: skip


def test_space_is_read_back_from_what_it_writes() -> None:
    durations = {"train.duration": {"choice": [{"epochs": 3}, {"steps": 7}]}}
    space = read_space(CONDITIONAL | durations | {"optim.momentum": {"uniform": [0.5, 0.9]}})
    assert read_space(yaml.safe_load(yaml.safe_dump(space.to_mapping(), sort_keys=False))) == space


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space: expected at least one knob, got nothing"),
        ([1], "space: expected at least one knob"),
        ({"model.fusoin": {"value": "fast"}}, "space.model.fusoin: expected a path .* did you mean 'model.fusion'"),
        ({"model.scaling.widht": {"value": 1}}, "did you mean 'model.scaling.width'"),
        ({"model.fusion": {"choice": ["fast", "fats"]}}, r"space\.model\.fusion: expected one of fast, .*got 'fats'; did you mean 'fast'"),
        ({"model.fusion": "fast"}, "expected a domain, got 'fast'; as in {choice"),
        ({"model.fusion": {"chioce": ["fast"]}}, "did you mean 'choice'"),
        ({"model.fusion": {"choice": ["fast"], "value": "sum"}}, "exactly one of"),
        ({"model.fusion": {}}, "exactly one of .* got nothing"),
        ({"model.fusion": {"choice": []}}, "at least one value"),
        ({"model.fusion": {"choice": ["fast", "fast"]}}, "each value once, got 'fast' twice"),
        ({"model.phi": {"choice": [1, "1"]}}, "each value once, got '1' twice"),
        ({"optim.lr_per_64": {"uniform": [0.2, 0.1]}}, "low < high"),
        ({"optim.lr_per_64": {"loguniform": [0, 0.1]}}, "positive bounds"),
        ({"optim.lr_per_64": {"uniform": [0.1]}}, r"\[low, high\]"),
        ({"optim.lr_per_64": {"uniform": [0.1, "much"]}}, "numbers"),
        ({"optim.lr_per_64": {"uniform": [0.1, float("inf")]}}, "numbers"),
        ({"train.batch_size": {"uniform": [8, 64]}}, "a whole number, got a range of any numbers"),
        ({"train.batch_size": {"quniform": [8, 64, 0.5]}}, "a whole number, got 8.5"),
        ({"train.batch_size": {"randint": [8, 9.5]}}, "whole numbers"),
        ({"optim.momentum": {"quniform": [0, 1, 0.3]}}, "whole steps of 0.3 from 0, got 1; end at 0.9 or 1.2"),
        ({"optim.nesterov": {"randint": [0, 1]}}, "true or false"),
        ({"model.fusion": {"uniform": [0, 1]}}, "one of fast"),
        ({"train.seed": {"choice": [1, 2]}}, "trials.seeds: N instead"),
        ({"launch.workers": {"choice": [1, 2]}}, "a setting of how a network is trained"),
        ({"data.root": {"choice": ["a", "b"]}}, "a setting of how a network is trained"),
        ({"model.scaling": {"value": {"depth": 1}}, "model.scaling.width": {"value": 1.3}}, "no knob around model.scaling.width"),
        ({"train.duration": {"choice": [{"epoch": 3}]}}, r"space\.train\.duration\.epoch: .*did you mean 'epochs'"),
        ({"model.phi": {"randint": [6, 9]}}, "one of 0"),
        ({"model.scaling.head": {"value": 1, "when": {"model.fusion": "fast"}}}, r"when\.model\.fusion: expected a knob of this space"),
        ({"model.scaling.head": {"value": 1, "when": {}}}, "path of a knob: value"),
        ({"model.fusion": {"choice": ["fast", "sum"]}, "model.scaling.head": {"value": 1, "when": {"model.fusion": "softmax"}}}, r"one of its values \(fast, sum\), got 'softmax'"),
        ({"optim.momentum": {"uniform": [0, 1]}, "model.scaling.head": {"value": 1, "when": {"optim.momentum": 0.5}}}, "a knob with a list of values, got a range"),
        ({"model.fusion": {"value": "fast", "when": {"model.phi": "0"}}, "model.phi": {"value": "0", "when": {"model.fusion": "fast"}}}, "no circle of conditions, got model.fusion and model.phi"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line(space: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_space(space)
    assert "\n" not in str(caught.value)
    assert caught.value.where.startswith("space")


def test_every_leaf_of_the_train_config_is_a_knob_or_apart() -> None:
    leaves = set(flatten(encode(TrainJob())))
    apart = {leaf for leaf in leaves if leaf not in known_paths()}
    assert {"run.name", "launch.workers", "data.root", "checkpoint.metric"} <= apart
    assert {leaf.split(".")[0] for leaf in apart} == {
        "run", "tracking", "launch", "checkpoint", "data", "train"
    }  # fmt: skip
    assert {"model.fusion", "optim.lr_per_64", "loss.gamma", "evaluation.nms"} <= set(known_paths())


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"model.topologie": "fpn"}, "did you mean 'model.topology'"),
        ({"model.topology": "fpn", "model.fusion": "fast"}, "its condition does not hold, got 'fast'"),
        ({"model.topology": "bifpn"}, r"points\[0\]\.model\.fusion: expected a value for every knob"),
        ({"model.topology": "panet", "model.fusion": "sum"}, "got 'sum'; widen the space"),
        ({"model.topology": "nas_fpn"}, "got 'nas_fpn'; widen"),
    ],
)  # fmt: skip
def test_a_known_point_must_lie_in_the_space(point: Sample, message: str) -> None:
    rest = {"model.scaling.resolution": 512, "train.batch_size": 8}
    with pytest.raises(ConfigError, match=message):
        read_space(CONDITIONAL).check(rest | point, "points[0]")


def test_every_sample_is_a_known_point() -> None:
    space = read_space(CONDITIONAL | {"optim.lr_per_64": {"loguniform": [0.02, 0.2]}})
    for i in range(50):
        assert space.check(space.sample(0, i), "") == space.sample(0, i)


class Asked:
    """In Optuna's place: takes the last of what it is offered, and remembers it."""

    def __init__(self) -> None:
        self.offered: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        self.offered[name] = choices
        return choices[-1]

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        self.offered[name] = (low, high, step, log)
        return high

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        self.offered[name] = (low, high, step)
        return high


def test_suggestions_follow_conditions_and_are_plain_for_optuna() -> None:
    asked = Asked()
    space = read_space(
        CONDITIONAL
        | {
            "optim.lr_per_64": {"loguniform": [0.02, 0.2]},
            "loss.gamma": {"quniform": [1.0, 2.0, 0.25]},
            "train.duration": {"choice": [{"epochs": 3}, {"steps": 7}]},
        }
    )
    sample = space.suggest(asked)
    assert space.check(sample, "") == sample
    assert sample["train.duration"] == {"steps": 7}
    assert "model.scaling.head" not in asked.offered  # softmax was taken
    assert asked.offered["optim.lr_per_64"] == (0.02, 0.2, None, True)
    assert asked.offered["loss.gamma"] == (1.0, 2.0, 0.25, False)
    assert asked.offered["train.batch_size"] == (8, 11, 1)
    assert asked.offered["train.duration"] == ['{"epochs": 3}', '{"steps": 7}']


def test_a_sample_is_laid_on_the_base_job() -> None:
    base = apply(TrainJob(), {"model.phi": "2", "optim.momentum": 0.8})
    job = apply(base, {"model.scaling.width": 1.3, "train.duration": {"steps": 7}})
    assert (job.model.phi, job.model.scaling.width, job.optim.momentum) == ("2", 1.3, 0.8)
    assert job.train.duration == Duration(steps=7)
    assert with_seed(job, 3).train.seed == job.train.seed + 3
    with pytest.raises(ConfigError, match=r"train\.batch_size"):
        apply(base, {"train.batch_size": 1.5})


def test_what_differs_from_the_defaults_is_read_back_equal() -> None:
    space = read_space(
        CONDITIONAL
        | {
            "train.duration": {"choice": [{"epochs": 300}, {"steps": 7}]},
            "optim.warmup": {"choice": [{"epochs": 1}, {"epochs": 2.5}, {"steps": 5}]},
            "model.freeze": {"choice": [[], ["backbone"]]},
        }
    )
    for i in range(40):
        job = apply(TrainJob(), space.sample(2, i))
        written = yaml.safe_load(yaml.safe_dump(changed(job)))
        assert decode(TrainJob, written) == job
    assert changed(TrainJob()) == {}
    assert changed(apply(TrainJob(), {"train.duration": {"steps": 7}})) == {
        "train": {"duration": {"steps": 7}}
    }


def test_an_arm_is_known_by_what_it_trains() -> None:
    base, sample = TrainJob(), {"model.fusion": "sum", "optim.lr_per_64": 0.1}
    job = apply(base, sample)
    key = arm_key(job)
    assert key == arm_key(apply(base, dict(reversed(sample.items()))))
    assert key == arm_key(with_seed(job, 5))
    assert key == arm_key(apply(job, {"optim.momentum": base.optim.momentum}))
    elsewhere = {"launch.workers": 4, "run.name": "x", "data.check": "all", "data.root": "there"}
    assert key == arm_key(apply(job, elsewhere))
    for path, value in (
        ("optim.lr_per_64", 0.11), ("train.duration", {"steps": 3}), ("model.phi", "1")
    ):  # fmt: skip
        assert key != arm_key(apply(job, {path: value}))


def test_no_two_samples_of_a_large_space_share_a_key() -> None:
    space = read_space(CONDITIONAL)
    keys = [arm_key(apply(TrainJob(), sample)) for sample in space.grid()]
    assert len(set(keys)) == len(keys)
