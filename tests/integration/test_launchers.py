"""The same training under plain python, torchrun and Ray; on one worker and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import Done, settings, train

pytestmark = pytest.mark.integration
STEPS = 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """One short training each way, all with the same configuration."""
    base = tmp_path_factory.mktemp("launchers")
    # One thread everywhere: on one worker plain python would otherwise use all cores, two share them.
    common = [*settings(), "--steps", str(STEPS)]

    def run(name: str, *arguments: str, torchrun: int = 0) -> Done:
        output: Path = base / name
        output.mkdir()
        done = train(output, *common, *arguments, torchrun=torchrun)
        assert done.code == 0, done.err + done.out
        return done

    return {
        "plain": run("plain", "--launcher", "local"),
        "torchrun 1": run("torchrun1", "--launcher", "local", torchrun=1),
        "ray 1": run("ray1"),
        "torchrun 2": run("torchrun2", "--launcher", "local", "--workers", "2", torchrun=2),
        "ray 2": run("ray2", "--workers", "2"),
    }


@pytest.mark.parametrize(
    ("one", "other"), [("plain", "torchrun 1"), ("plain", "ray 1"), ("torchrun 2", "ray 2")]
)
def test_launchers_agree_bit_for_bit(runs: dict[str, Done], one: str, other: str) -> None:
    assert runs[one].history() == runs[other].history()
    a, b = runs[one].weights(), runs[other].weights()
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_world_size_does_not_change_the_curve(runs: dict[str, Done]) -> None:
    """1 worker x 8 images against 2 workers x 4 whose batch norms are synchronised."""
    one, two = dict(runs["ray 1"].history()), dict(runs["ray 2"].history())
    assert list(one) == list(two) == list(range(1, STEPS + 1))
    assert max(abs(one[step] - two[step]) / one[step] for step in one) < 1e-4
    a, b = runs["ray 1"].weights(), runs["ray 2"].weights()
    worst = max(float((a[key] - b[key]).abs().max()) for key in a)
    assert worst < 1e-4


def test_report_and_record(runs: dict[str, Done]) -> None:
    report = runs["ray 1"].report
    assert report["status"] == "finished"
    assert report["step"] == STEPS
    assert Path(report["checkpoint"].removeprefix("file://")).name == f"step_{STEPS:08d}"
    assert {"val/AP", "val/AP50"} <= report["metrics"].keys()
    assert report["img_per_s"] > 0
    assert report["params"] > 0
    assert runs["ray 1"].history("val/AP50") == [(STEPS, report["metrics"]["val/AP50"])]
