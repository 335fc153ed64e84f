"""The loop: exact resume, agreed stops, golden losses."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers.loop import Record, dataset, recipe, run
from safetensors.torch import load_file

from model.data.dataset import DetectionDataset, OnDamage, collate
from model.data.sampler import plan_batch
from model.errors import DataError, DivergedError
from model.network.detector import Detector
from model.network.scaling import Part
from model.training.config import Duration
from model.training.fit import _writer
from model.training.optim import learning_rate
from model.training.state import read_progress
from model.training.step import Schedule, Trainee
from orchestrator.storage.checkpoints import CheckpointStore

GOLDEN = Path(__file__).parents[2] / "golden" / "tiny_losses.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return dataset(tmp_path_factory.mktemp("data") / "shapes")


class Dying(Record):
    """Whoever logs to it is gone."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise RuntimeError("pulled the plug")


def weights(store: CheckpointStore) -> dict[str, torch.Tensor]:
    with store.open(store.steps()[-1]) as folder:
        ema = {f"ema.{k}": v for k, v in load_file(folder / "ema.safetensors").items()}
        return load_file(folder / "model.safetensors") | ema


@pytest.mark.parametrize("log_every", [1, 5])
def test_resume_in_the_middle_of_an_epoch_is_exact(
    data: DetectionDataset, tmp_path: Path, log_every: int
) -> None:
    """Bit-equal weights and the same log, though step 7 or 10 lies inside an epoch of 3 steps."""
    whole, parts = Record(), Record()
    _, through = run(data, tmp_path / "through", whole, log_every_steps=log_every)
    first, _ = run(data, tmp_path / "parts", parts, stop_after=7, log_every_steps=log_every)
    assert first.stopped == "asked to"
    assert first.step in (7, 10)
    second, resumed = run(data, tmp_path / "parts", parts, log_every_steps=log_every)
    assert (second.step, second.started_at_step, second.stopped) == (12, first.step, None)
    assert parts.values("train/loss") == whole.values("train/loss")
    a, b = weights(through), weights(resumed)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_resume_inside_a_log_interval_keeps_its_mean(
    data: DetectionDataset, tmp_path: Path
) -> None:
    """A checkpoint at step 4 of an interval of 6 carries the sums of the steps before it."""
    whole, parts = Record(), Record()
    run(data, tmp_path / "through", whole, log_every_steps=6)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(
            data, tmp_path / "parts", Dying(),
            log_every_steps=6, checkpoint_every=Duration(steps=4),
        )  # fmt: skip
    run(data, tmp_path / "parts", parts, log_every_steps=6)
    assert parts.values("train/loss") == whole.values("train/loss")


def test_a_finished_run_is_not_trained_further(data: DetectionDataset, tmp_path: Path) -> None:
    first, store = run(data, tmp_path, Record())
    before = weights(store)
    again = Record()
    second, _ = run(data, tmp_path, again)
    assert again.rows == []
    assert second.step == 12
    assert second.metrics == first.metrics
    assert all(torch.equal(value, weights(store)[key]) for key, value in before.items())


def test_divergence_stops_before_the_update(data: DetectionDataset, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"step \d+: .*gradient norm (nan|inf).*lower optim"):
        run(data, tmp_path, Record(), lr_per_64=1e25, checkpoint_every=Duration(steps=1))
    saved = sorted(path.name for path in tmp_path.glob("step_*"))
    assert saved, "the steps before it are kept"
    for name, tensor in load_file(tmp_path / saved[-1] / "model.safetensors").items():
        assert torch.isfinite(tensor).all(), name


def test_losses_are_the_golden_ones(data: DetectionDataset, tmp_path: Path) -> None:
    """A refactoring moves no wall if these stay. Recorded by this test where the file is absent."""
    record = Record()
    run(data, tmp_path, record)
    losses = [value for _, value in record.values("train/loss")]
    golden = json.loads(GOLDEN.read_text())["losses"]
    assert losses == pytest.approx(golden, rel=2e-4)


def test_a_batch_without_boxes_touches_every_parameter(data: DetectionDataset) -> None:
    torch.manual_seed(0)
    asked = recipe(batch_size=4, bn_group=4)
    plan = plan_batch(4, 4, 1)
    trainee = Trainee(Detector(asked.network), asked, plan, 0, torch.device("cpu"))
    batch = collate([data[(0, image)] for image in range(4)])
    object.__setattr__(batch, "labels", torch.full_like(batch.labels, -1))
    row = trainee.step(0, Schedule.of(asked, 24), [batch])
    assert torch.isfinite(row).all()
    assert all(p.grad is not None for p in trainee.detector.parameters())
    assert row[3] == 0


@pytest.mark.parametrize("parts", [("backbone",), ("pyramid", "box_head")])
def test_frozen_parts_do_not_change(data: DetectionDataset, parts: tuple[Part, ...]) -> None:
    """Weights and running statistics bit for bit; the rest learns."""
    torch.manual_seed(0)
    asked = replace(recipe(batch_size=8, bn_group=4), freeze=parts)
    trainee = Trainee(Detector(asked.network), asked, plan_batch(8, 4, 1), 0, torch.device("cpu"))
    before = {key: value.clone() for key, value in trainee.detector.state_dict().items()}
    samples = collate([data[(0, image)] for image in range(8)])
    for step in range(2):
        trainee.step(step, Schedule.of(asked, 24), [samples[:4], samples[4:]])
    changed = {
        key
        for key, value in trainee.detector.state_dict().items()
        if not key.endswith("num_batches_tracked") and not torch.equal(value, before[key])
    }
    average = trainee.ema.module.state_dict()
    for part in get_args(Part):
        touched = {key for key in changed if key.startswith(part)}
        assert bool(touched) == (part not in parts), part
    frozen = [key for key in before if key.startswith(parts) and "num_batches" not in key]
    assert all(torch.equal(average[key], before[key]) for key in frozen)


def test_recomputed_activations_give_the_same_run(data: DetectionDataset, tmp_path: Path) -> None:
    """Losses, weights and running statistics bit for bit: layers that run twice count once."""
    samples = collate([data[(0, image)] for image in range(8)])

    def trained(recompute: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        asked = replace(recipe(batch_size=8, bn_group=4), checkpoint_activations=recompute)
        detector = Detector(asked.network, recompute=recompute)
        trainee = Trainee(detector, asked, plan_batch(8, 4, 1), 0, torch.device("cpu"))
        schedule = Schedule.of(asked, 24)
        rows = [trainee.step(n, schedule, [samples[:4], samples[4:]]) for n in range(3)]
        return [float(row[0]) for row in rows], trainee.detector.state_dict()

    kept, again = trained(False), trained(True)
    assert kept[0] == again[0]
    for key, value in kept[1].items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, again[1][key]), key


def test_initial_weights_are_for_a_new_run_only(data: DetectionDataset, tmp_path: Path) -> None:
    called = []
    run(data, tmp_path, Record(), stop_after=5, initial=called.append)
    run(data, tmp_path, Record(), initial=called.append)
    assert len(called) == 1


def test_the_order_of_groups_does_not_leak_into_statistics(data: DetectionDataset) -> None:
    """Running statistics after a step are the mean over its groups, in whatever order they ran."""
    samples = collate([data[(0, image)] for image in range(8)])

    def statistics(order: list[slice]) -> torch.Tensor:
        torch.manual_seed(0)
        asked = recipe(bn_group=4)
        trainee = Trainee(
            Detector(asked.network), asked, plan_batch(8, 4, 1), 0, torch.device("cpu")
        )
        trainee.step(0, Schedule.of(asked, 24), [samples[rows] for rows in order])
        return torch.cat([b.flatten() for b in trainee.statistics.buffers])

    one = statistics([slice(0, 4), slice(4, 8)])
    other = statistics([slice(4, 8), slice(0, 4)])
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_snapshot_does_not_change_while_training_goes_on(data: DetectionDataset) -> None:
    """What is written later are the weights of the step that was saved."""
    torch.manual_seed(0)
    asked = recipe(batch_size=4, bn_group=4)
    trainee = Trainee(Detector(asked.network), asked, plan_batch(4, 4, 1), 0, torch.device("cpu"))
    write = _writer(trainee, torch.zeros(7), 0, {"network": {}}, data, {})
    before = {k: v.clone() for k, v in trainee.detector.state_dict().items()}
    batch = collate([data[(0, image)] for image in range(4)])
    trainee.step(0, Schedule.of(asked, 24), [batch])
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        found = load_file(Path(folder) / "model.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in found.items())


def test_a_run_that_diverges_goes_back_and_on_at_half_the_rate(
    data: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad step: from then on it is the run that had half the rate since the checkpoint."""
    plain = Trainee.step
    bad = {7}

    def step(self: Trainee, number: int, *arguments: Any, **more: Any) -> torch.Tensor:
        if number in bad:
            bad.remove(number)
            raise DivergedError(number, float("nan"), float("nan"), 0.1)
        return plain(self, number, *arguments, **more)

    monkeypatch.setattr(Trainee, "step", step)
    record = Record()
    result, store = run(data, tmp_path, record, checkpoint_every=Duration(steps=5))
    assert result.rolled_back
    assert result.step == 12
    assert record.values("train/rolled_back") == [(5, 1.0)]
    rates = dict(record.values("train/lr"))
    halved = [learning_rate_of(step) / 2 for step in range(5, 12)]
    assert [rates[step + 1] for step in range(5, 12)] == pytest.approx(halved)
    with store.open(12) as folder:
        assert read_progress(folder).lr_factor == 0.5


def learning_rate_of(step: int) -> float:
    return learning_rate(step, recipe().optim, batch_size=8, warmup_steps=3, total_steps=12)


def test_a_run_that_diverges_twice_ends(
    data: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trainee.step

    def step(self: Trainee, number: int, *arguments: Any, **more: Any) -> torch.Tensor:
        if number == 7:
            raise DivergedError(number, float("nan"), float("nan"), 0.1)
        return plain(self, number, *arguments, **more)

    monkeypatch.setattr(Trainee, "step", step)
    with pytest.raises(DivergedError, match="step 7"):
        run(data, tmp_path, Record(), checkpoint_every=Duration(steps=5))


def damage(data: DetectionDataset, names: set[str], on_damage: OnDamage) -> DetectionDataset:
    def read(name: str) -> bytes:
        return b"torn" if name in names else data.read(name)

    return DetectionDataset(data.index, read, 64, data.augment, data.seed, on_damage)


def test_damaged_images_are_replaced_and_counted(data: DetectionDataset, tmp_path: Path) -> None:
    """Two of 24 images in 4 epochs of 3 steps: met 8 times at least, the same in every run."""
    broken = damage(data, set(data.index.file_names[[3, 11]].tolist()), "replace")
    first, second = Record(), Record()
    result, _ = run(broken, tmp_path / "a", first)
    run(broken, tmp_path / "b", second)
    assert result.damaged_images >= 8
    assert sum(v for _, v in first.values("data/damaged_images")) == result.damaged_images
    assert first.values("train/loss") == second.values("train/loss")


def test_damaged_images_end_a_strict_run(data: DetectionDataset, tmp_path: Path) -> None:
    name = str(data.index.file_names[3])
    with pytest.raises(DataError, match=name):
        run(damage(data, {name}, "fail"), tmp_path, Record())


def test_a_storage_that_gives_nothing_ends_the_run(data: DetectionDataset, tmp_path: Path) -> None:
    everything = damage(data, set(data.index.file_names.tolist()), "replace")
    with pytest.raises(DataError, match="a readable image"):
        run(everything, tmp_path, Record())


def test_an_evaluation_that_was_put_off_is_made_up_for(
    data: DetectionDataset, tmp_path: Path
) -> None:
    """Stopped in the step of an evaluation: saved at once, scored by whoever goes on."""
    whole, parts = Record(), Record()
    every = {"evaluate_every": Duration(steps=6), "log_every_steps": 6}
    run(data, tmp_path / "through", whole, **every)
    first, _ = run(data, tmp_path / "parts", parts, stop_after=6, **every)
    assert (first.step, parts.values("val/AP")) == (6, [])
    second, _ = run(data, tmp_path / "parts", parts, **every)
    assert second.started_at_step == 6
    assert parts.values("val/AP") == whole.values("val/AP")
    assert [step for step, _ in parts.values("val/AP")] == [6, 12]


def test_each_evaluation_is_shown_after_it_was_logged(
    data: DetectionDataset, tmp_path: Path
) -> None:
    """With the detections of every image and the weights of every fusion node."""
    record = Record()
    run(data, tmp_path, record, evaluate_every=Duration(steps=3), duration=Duration(steps=6))
    assert [step for step, _ in record.shown] == [3, 6]
    step, evaluation = record.shown[-1]
    scored = [metrics for at, metrics in record.rows if at == step and "val/AP" in metrics]
    assert scored[-1].items() >= evaluation.metrics.items()
    assert len(evaluation.rows)
    assert evaluation.rows[:, 0].max() < len(data)
    assert evaluation.precision.shape == (10, 101, data.index.classes.num_classes)
    assert any(key.startswith("val_fusion/cell0.") for key in scored[-1])
