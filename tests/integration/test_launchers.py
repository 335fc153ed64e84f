"""The same training under plain python, torchrun and Ray; on one worker and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import Done, settings, train

pytestmark = pytest.mark.integration
STEPS = 20
# torch's channels-last batch norm on a CPU adds plain float32 sums (errors of 1e-5), which a random
# network multiplies from step to step; its contiguous kernel is exact to the last digits.
COMMON = [
    *settings(train__channels_last="false", optim__lr_per_64=0.05, launch__threads_per_worker=1),
    *("--steps", str(STEPS)),
]
TWO = ("--workers", "2")
GROUPS = ("--set", "train.bn_group=4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """One short training each way; by default all 8 images are normalised together."""
    base = tmp_path_factory.mktemp("launchers")

    def run(name: str, *arguments: str, torchrun: int = 0) -> Done:
        output: Path = base / name.replace(" ", "-")
        output.mkdir()
        done = train(output, *COMMON, *arguments, torchrun=torchrun)
        assert done.code == 0, done.err + done.out
        return done

    local = ("--launcher", "local")
    return {
        "plain": run("plain", *local),
        "torchrun 1": run("torchrun 1", *local, torchrun=1),
        "ray 1": run("ray 1"),
        "torchrun 2": run("torchrun 2", *local, *TWO, torchrun=2),
        "ray 2": run("ray 2", *TWO),
        "groups 1": run("groups 1", *local, *GROUPS),
        "groups 2": run("groups 2", *TWO, *GROUPS),
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("plain", "torchrun 1"),
        ("plain", "ray 1"),
        ("torchrun 2", "ray 2"),
        # Whole groups on each worker need no traffic, and then nothing at all differs.
        ("groups 1", "groups 2"),
    ],
)
def test_bit_for_bit(runs: dict[str, Done], one: str, other: str) -> None:
    assert runs[one].history() == runs[other].history()
    a, b = runs[one].weights(), runs[other].weights()
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_synchronised_batch_norm_keeps_the_curve(runs: dict[str, Done]) -> None:
    """1 worker x 8 images against 2 workers x 4 whose batch norms are synchronised."""
    one, two = dict(runs["ray 1"].history()), dict(runs["ray 2"].history())
    assert list(one) == list(two) == list(range(1, STEPS + 1))
    assert one != two  # they are computed differently, so an equal log would be a copy
    assert max(abs(one[step] - two[step]) / one[step] for step in one) < 1e-4
    a, b = runs["ray 1"].weights(), runs["ray 2"].weights()
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-4


def test_report_and_record(runs: dict[str, Done]) -> None:
    report = runs["ray 1"].report
    assert report["status"] == "finished"
    assert report["step"] == STEPS
    assert Path(report["checkpoint"].removeprefix("file://")).name == f"step_{STEPS:08d}"
    assert {"val/AP", "val/AP50"} <= report["metrics"].keys()
    assert report["img_per_s"] > 0
    assert report["params"] > 0
    assert runs["ray 1"].history("val/AP50") == [(STEPS, report["metrics"]["val/AP50"])]
