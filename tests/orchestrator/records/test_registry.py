"""From a run to a served model: every gate made to fail, and what is written where none does."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.entities import Dataset, DatasetInput, InputTag, Param
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from model.data.index import ClassMap
from model.network.detector import Detector
from model.network.scaling import ModelConfig, resolve
from model.predictor import Predictor
from model.training.state import Progress, network_config, write_checkpoint
from orchestrator.errors import CheckpointError, ConfigError, TrackingError, UserError
from orchestrator.records import package
from orchestrator.records.gates import Gate
from orchestrator.records.registry import Promotion, Rules, promote
from orchestrator.records.sources import connect, open_model
from orchestrator.records.tracker import CHECKPOINTS, OUTCOME, Tracker, tracking_uri


def write_step(folder: Path, step: int, metrics: dict[str, float], lr_factor: float = 1.0) -> None:
    """A tiny detector's checkpoint; the step is the seed of its weights."""
    config = ModelConfig(
        backbone="test_efficientnet", image_size_px=64, max_level=6, fpn_channels=16,
        fpn_repeats=1, head_layers=1,
    )  # fmt: skip
    torch.manual_seed(step)
    detector = Detector(resolve(config, 2))
    target = folder / f"step_{step:08d}"
    target.mkdir(parents=True)
    state = detector.state_dict()
    write_checkpoint(
        target, model=state, ema=state, progress=Progress(step, {}, torch.zeros(6), lr_factor),
        config={"network": network_config(detector.spec), "job": {}},
        classes=ClassMap((3, 8), ("cat", "dog")), metrics=metrics,
    )  # fmt: skip


@dataclass
class Runs:
    """Makes runs that look like those of jobs/train.py, and promotes them under one name."""

    tracker: Tracker
    folder: Path
    name: str

    def make(
        self,
        scores: dict[int, float | None],
        *,
        outcome: str | None = "finished",
        status: str = "FINISHED",
        data: str = "coco",
        digest: str | None = None,
        lr_factor: float = 1.0,
    ) -> str:
        """scores: val/AP of the checkpoint at each step, None without an evaluation."""
        client = self.tracker.client
        run_id = str(client.create_run(self.tracker.experiment_id, run_name="a run").info.run_id)
        place = self.folder / run_id / "checkpoints"
        for step, score in scores.items():
            metrics = {} if score is None else {"val/AP": score, "val_class/cat": score / 2}
            write_step(place, step, metrics, lr_factor)
            if score is not None:
                client.log_metric(run_id, "val/AP", score, timestamp=1000 + step, step=step)
        client.set_tag(run_id, CHECKPOINTS, place.as_uri())
        if outcome:
            client.set_tag(run_id, OUTCOME, outcome)
        params = [Param("data.root", data), Param("derived.val_images", "50")]
        client.log_batch(run_id, params=params)
        if digest:
            facts = Dataset("val", digest, "local", "{}")
            tags = [InputTag("mlflow.data.context", "validation")]
            client.log_inputs(run_id, [DatasetInput(facts, tags)])
        client.set_terminated(run_id, status)
        return run_id

    def promote(self, run_id: str, **options: Any) -> Promotion:
        options = {"ask": ask_here, **options}
        return promote(self.tracker.client, run_id, self.name, **options)

    def refused(self, run_id: str, **options: Any) -> dict[str, Gate]:
        """The gates of a refusal, by name, after a look that nothing was written."""
        before = self.written()
        shown: list[Gate] = []
        with pytest.raises(ConfigError) as raised:
            self.promote(run_id, show=shown.extend, **options)
        assert "\n" not in str(raised.value)
        failed = [gate.name for gate in shown if not gate.passed]
        assert failed
        assert all(name in str(raised.value) for name in failed)
        assert self.written() == before
        return {gate.name: gate for gate in shown}

    def written(self) -> tuple[int, int, list[tuple[str, dict[str, str]]]]:
        client = self.tracker.client
        models = client.search_logged_models([self.tracker.experiment_id], max_results=1000)
        versions = client.search_model_versions(f"name='{self.name}'")
        names = client.search_registered_models(f"name='{self.name}'")
        return len(models), len(versions), [(one.name, dict(one.aliases)) for one in names]

    def served(self, alias: str = "champion") -> ModelVersion:
        return self.tracker.client.get_model_version_by_alias(self.name, alias)


def ask_here(folder: Path, image: bytes) -> list[package.Row]:
    """As `ask_in_new_process`, in this one: seconds quicker, with the repository's own code."""
    found = mlflow.pyfunc.load_model(str(folder)).predict(
        pd.DataFrame({"image": [image]}), params={"score_threshold": 0.0}
    )
    columns = ["x", "y", "width", "height", "score", "category_id"]
    return [tuple(row) for row in found[columns].itertuples(index=False)]


@pytest.fixture
def runs(tracker: Tracker, tmp_path: Path) -> Runs:
    torch.set_num_threads(1)
    return Runs(tracker, tmp_path, f"detector-{uuid.uuid4().hex[:8]}")


AP_GATE = "val/AP not below the champion's"


def test_the_best_checkpoint_becomes_champion(runs: Runs) -> None:
    run_id = runs.make({10: 0.2, 20: 0.4, 30: 0.3})
    shown: list[Gate] = []
    rules = Rules(require=(("val/AP", 0.4), ("val_class/cat", 0.1)))
    done = runs.promote(run_id, rules=rules, show=shown.extend)
    assert (done.step, done.version, done.created, done.previous) == (20, "1", True, None)
    assert [gate.passed for gate in shown] == [True] * 6
    version = runs.served()
    assert version.run_id == run_id
    assert version.tags == {
        "effdet.run": run_id, "effdet.step": "20", "effdet.metric.val/AP": "0.4",
    }  # fmt: skip
    model = runs.tracker.client.get_logged_model(str(done.model_id))
    assert model.status == "READY"
    assert (model.source_run_id, model.params["phi"], model.params["fusion"]) == (
        run_id,
        "0",
        "fast",
    )
    scored = {metric.key: metric for metric in model.metrics}
    assert (scored["val/AP"].value, scored["val/AP"].step) == (0.4, 20)
    outputs = runs.tracker.client.get_run(run_id).outputs.model_outputs
    assert [(one.model_id, one.step) for one in outputs] == [(model.model_id, 20)]
    history = runs.tracker.client.get_metric_history(run_id, "val/AP")
    assert sorted(row.step for row in history) == [10, 20, 30]  # no point twice


def test_what_was_registered_answers_like_the_checkpoint(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = runs.make({7: 0.5})
    model_id = str(runs.promote(run_id).model_id)
    image = package.sample_image(50)
    with open_model(f"runs:/{run_id}", runs.tracker.uri) as folder:
        (expected,) = Predictor.load(folder, "cpu").predict([image, image], score_threshold=0.0)[1:]
    for source in (f"models:/{runs.name}@champion", f"models:/{runs.name}/1"):
        with open_model(source, runs.tracker.uri) as folder:
            assert not (folder / "model.safetensors").exists()
            found = Predictor.load(folder, "cpu").predict([image, image], score_threshold=0.0)[1]
            np.testing.assert_array_equal(found.boxes_xywh, expected.boxes_xywh)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    uri = runs.tracker.client.get_logged_model(model_id).artifact_location
    served = mlflow.pyfunc.load_model(uri)
    table = pd.DataFrame({"image": [image, image]})
    answer = served.predict(table, params={"score_threshold": 0.0})
    second = answer[answer.image_index == 1]
    assert len(second) == len(expected) > 50
    np.testing.assert_allclose(
        second[["x", "y", "width", "height"]].to_numpy(), expected.boxes_xywh, atol=1e-6
    )
    assert set(second.category) <= {"cat", "dog"}
    above = float(np.sort(expected.scores)[-10])
    assert 0 < len(served.predict(table[:1], params={"score_threshold": above})) < 10
    with pytest.raises(MlflowException, match="row 1: image: expected"):
        served.predict(pd.DataFrame({"image": [image, b"no image"]}))


def test_aliases_move_and_the_one_before_is_kept(runs: Runs) -> None:
    first, second = runs.make({5: 0.3}), runs.make({5: 0.35})
    runs.promote(first)
    done = runs.promote(second)
    assert (done.version, done.previous) == ("2", "1")
    assert (runs.served().run_id, runs.served("previous").run_id) == (second, first)
    assert runs.served().tags["effdet.previous"] == "1"
    runs.promote(first, alias="staging")
    assert str(runs.served("staging").version) == "3"
    assert (runs.served().run_id, runs.served("previous").run_id) == (second, first)


def test_promoting_the_champion_again_changes_nothing(runs: Runs) -> None:
    run_id = runs.make({5: 0.3})
    runs.promote(run_id)
    before = runs.written()
    done = runs.promote(run_id)
    assert (done.version, done.created) == ("1", False)
    assert runs.written() == before


def test_a_dry_run_registers_nothing(runs: Runs) -> None:
    before = runs.written()
    done = runs.promote(runs.make({5: 0.3}), dry_run=True)
    assert (done.version, done.created) == (None, False)
    assert runs.written() == before


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        ("failed", "FAILED"),
        (None, "RUNNING"),
        ("stopped: SIGTERM", "KILLED"),
        ("finished", "RUNNING"),
    ],
)
def test_only_finished_runs_unless_allowed(runs: Runs, outcome: str | None, status: str) -> None:
    run_id = runs.make({5: 0.3}, outcome=outcome, status=status)
    gates = runs.refused(run_id)
    assert [name for name, gate in gates.items() if not gate.passed] == ["run finished"]
    assert runs.promote(run_id, rules=Rules(allow_unfinished=True)).version == "1"


def test_diverged_and_rolled_back_runs_are_refused(runs: Runs) -> None:
    everything = Rules(allow_worse=True, allow_unfinished=True)
    diverged = runs.make({5: 0.3}, outcome="diverged", status="FAILED")
    assert "diverged" in runs.refused(diverged, rules=everything)["no divergence"].found
    slowed = runs.make({5: 0.3}, lr_factor=0.5)
    assert "rolled back" in runs.refused(slowed, rules=everything)["no divergence"].found
    recorded = runs.make({5: 0.3})
    runs.tracker.client.log_metric(recorded, "train/rolled_back", 1.0, step=3)
    assert "rolled back" in runs.refused(recorded, rules=everything)["no divergence"].found


def test_required_metrics(runs: Runs) -> None:
    run_id = runs.make({5: 0.3})
    rules = Rules(require=(("val/AP", 0.3), ("val/AP", 0.31), ("val/AP50", 0.1)))
    gates = runs.refused(run_id, rules=rules)
    assert gates["val/AP >= 0.3"].passed
    assert (gates["val/AP >= 0.31"].passed, gates["val/AP >= 0.31"].found) == (False, "0.3")
    assert (gates["val/AP50 >= 0.1"].passed, gates["val/AP50 >= 0.1"].found) == (False, "missing")


def test_the_champion_is_not_replaced_by_a_worse_one(runs: Runs) -> None:
    runs.promote(runs.make({5: 0.4}))
    worse = runs.make({5: 0.39})
    assert "0.39, version 1 has 0.4" in runs.refused(worse)[AP_GATE].found
    assert runs.promote(worse, rules=Rules(allow_worse=True)).version == "2"
    assert runs.promote(runs.make({5: 0.39})).version == "3"  # as good is good enough


@pytest.mark.parametrize(
    ("champion", "candidate", "comparable"),
    [
        ({"digest": "a"}, {"digest": "a", "data": "moved"}, True),
        ({"digest": "a"}, {"digest": "b"}, False),
        ({"digest": "a"}, {}, True),  # one has no digest: root and number decide
        ({}, {"data": "other"}, False),
    ],
)
def test_only_scores_of_the_same_data_are_compared(
    runs: Runs, champion: dict[str, str], candidate: dict[str, str], comparable: bool
) -> None:
    runs.promote(runs.make({5: 0.3}, **champion))
    better = runs.make({5: 0.5}, **candidate)
    if comparable:
        assert runs.promote(better).version == "2"
        return
    assert "not comparable with version 1" in runs.refused(better)[AP_GATE].found
    assert runs.promote(better, rules=Rules(allow_worse=True)).version == "2"


def test_a_missing_objective_or_run_of_the_champion_is_not_comparable(runs: Runs) -> None:
    first = runs.make({5: 0.3})
    runs.promote(first)
    unscored = runs.make({5: None})
    assert "val/AP of this checkpoint is missing" in (
        runs.refused(unscored, checkpoint="last")[AP_GATE].found
    )
    assert "is missing" in (
        runs.refused(runs.make({5: 0.9}), rules=Rules(objective="val/AP75"))[
            "val/AP75 not below the champion's"
        ].found
    )
    runs.tracker.client.set_model_version_tag(runs.name, "1", "effdet.metric.val/AP", "0.1")
    assert runs.promote(runs.make({5: 0.2})).version == "2"  # the tag is what counts


@pytest.mark.parametrize(
    "how",
    [pytest.param("loads not", marks=pytest.mark.integration), "other boxes", "fewer boxes"],
)
def test_a_package_that_answers_otherwise_is_refused(runs: Runs, how: str) -> None:
    def ask(folder: Path, image: bytes) -> list[package.Row]:
        if how == "loads not":
            (folder / package.CHECKPOINT / "ema.safetensors").write_bytes(b"torn")
            return package.ask_in_new_process(folder, image)
        rows = ask_here(folder, image)
        x, *rest = rows[3]
        return rows[1:] if how == "fewer boxes" else [*rows[:3], (x + 0.01, *rest), *rows[4:]]

    gates = runs.refused(runs.make({5: 0.3}), ask=ask)
    assert not gates["packaged model answers"].passed
    assert "\n" not in gates["packaged model answers"].found


@pytest.mark.integration
def test_a_package_runs_with_its_own_code_alone(runs: Runs, tmp_path: Path) -> None:
    """In a fresh interpreter that does not know this repository."""
    with open_model(f"runs:/{runs.make({5: 0.3})}", runs.tracker.uri) as folder:
        package.package(folder, tmp_path / "packaged")
        assert "100 boxes" in package.check_answers(tmp_path / "packaged", folder)
    shutil.rmtree(tmp_path / "packaged" / "code")
    with pytest.raises(RuntimeError, match="model"):
        package.ask_in_new_process(tmp_path / "packaged", package.sample_image(64))


def test_a_package_holds_no_pickle_and_pins_what_it_imports(runs: Runs, tmp_path: Path) -> None:
    import ast
    import sys
    from importlib.metadata import packages_distributions, version

    with open_model(f"runs:/{runs.make({5: 0.3})}", runs.tracker.uri) as folder:
        package.package(folder, tmp_path / "packaged", "some-run")
    files = {path.relative_to(tmp_path / "packaged") for path in (tmp_path / "packaged").rglob("*")}
    assert not [path for path in files if path.suffix in (".pkl", ".pt", ".pth", ".pyc")]
    pinned = (tmp_path / "packaged" / "requirements.txt").read_text().split()
    sources = [*(tmp_path / "packaged" / "code" / "model").rglob("*.py"), package.ENTRY]
    imported = set()
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
    owners = packages_distributions()
    names = {line.partition("==")[0] for line in pinned}
    for module in imported - sys.stdlib_module_names - {"model"}:
        assert names & {owner.lower().replace("_", "-") for owner in owners[module]}, module
    assert f"timm=={version('timm')}" in pinned


def test_checkpoints_are_chosen_by_step(runs: Runs) -> None:
    run_id = runs.make({10: 0.4, 20: 0.3, 30: None})
    assert runs.promote(run_id, checkpoint="20", dry_run=True).step == 20
    assert runs.promote(run_id, checkpoint="last", dry_run=True).step == 30
    with pytest.raises(ConfigError, match="best, last or a step that was kept, got 11"):
        runs.promote(run_id, checkpoint="11")
    with pytest.raises(ConfigError, match="a checkpoint with val/AP"):
        runs.promote(runs.make({5: None}))


def test_a_damaged_checkpoint_is_refused(runs: Runs) -> None:
    run_id = runs.make({5: 0.3})
    weights = runs.folder / run_id / "checkpoints" / "step_00000005" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    before = runs.written()
    with pytest.raises(CheckpointError):
        runs.promote(run_id)
    assert runs.written() == before


def test_external_models_are_no_sources(runs: Runs) -> None:
    """MLflow itself registers one that holds nothing."""
    client, run_id = runs.tracker.client, runs.make({5: 0.3})
    external = client.create_logged_model(
        runs.tracker.experiment_id, source_run_id=run_id,
        tags={"mlflow.model.isExternal": "true"},
    )  # fmt: skip
    for source in (f"models:/{external.model_id}", external.model_id):
        with pytest.raises(ConfigError, match=f"external.*promote its run {run_id}"):
            runs.promote(source)
    client.create_registered_model(runs.name)
    client.create_model_version(
        runs.name, external.artifact_location, run_id, model_id=external.model_id
    )
    with (
        pytest.raises(ConfigError, match="which is external"),
        open_model(f"models:/{runs.name}/1", runs.tracker.uri),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "alias"),
    [("a/b", "champion"), (" ", "champion"), ("ok", "latest"), ("ok", "v3"), ("ok", "a b"), ("ok", "previous")],
)  # fmt: skip
def test_names_that_mlflow_would_refuse_too_late(runs: Runs, name: str, alias: str) -> None:
    with pytest.raises(ConfigError, match=r"--name|--alias"):
        promote(runs.tracker.client, runs.make({5: 0.3}), name, alias=alias, ask=ask_here)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/step_00000001", "MODEL: expected a checkpoint's folder or URI"),
        ("runs:/0123", "RUN_ID: expected a run of this tracker"),
        ("models:/nothing@champion", "MODEL: expected a registered model"),
        ("models:/nothing/3", "MODEL: expected a registered model"),
        ("models:/nothing", "MODEL: expected a registered model"),
    ],
)
def test_models_that_are_not_there(runs: Runs, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message), open_model(source, runs.tracker.uri):
        pass


def test_a_run_without_evaluations_opens_its_newest_checkpoint(runs: Runs) -> None:
    run_id = runs.make({3: None, 9: None})
    with open_model(f"runs:/{run_id}", runs.tracker.uri) as folder:
        assert json.loads((folder / "meta.json").read_text())["step"] == 9
        place = str(folder)
    with open_model(place, "sqlite:////no/database") as folder:  # a folder needs no tracker
        assert folder == Path(place)


def test_trackers_that_are_not_there(
    tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrackingError, match="no file"):
        connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="an MLflow server or database that answers"):
        connect(f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert tracking_uri(None, tmp_path) == "http://there"
    assert tracking_uri("http://given", tmp_path) == "http://given"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_a_failed_upload_leaves_no_version(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = runs.make({5: 0.3})
    store = runs.folder / "in the way"
    store.write_text("a file where the artifacts' folder would be")
    experiment = runs.tracker.client.create_experiment(uuid.uuid4().hex, store.as_uri())
    client = runs.tracker.client
    moved = client.create_run(experiment).info.run_id
    for key, value in client.get_run(run_id).data.tags.items():
        if key.startswith("effdet."):
            client.set_tag(moved, key, value)
    client.set_terminated(moved, "FINISHED")
    with pytest.raises(TrackingError, match="to store and register the model"):
        runs.promote(moved)
    assert runs.written()[1:] == (0, [])
    (model,) = client.search_logged_models([experiment])
    assert model.status == "FAILED"
