from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities.logged_model import LoggedModel
from mlflow.exceptions import MlflowException

from orchestrator.records.run import TrackedRun
from orchestrator.records.scribe import (
    EXTERNAL,
    MAX_PARAM_CHARS,
    MAX_PARAMS,
    ROLE,
    STEP,
    URI,
    Scribe,
)  # fmt: skip
from orchestrator.records.tracker import OUTCOME, Tracker


@pytest.fixture
def scribe(tracker: Tracker, tracked: TrackedRun, tmp_path: Path) -> Scribe:
    return Scribe(tracker.client, tracked, str(tracked.run_id), tmp_path)


def twice(scribe: Scribe, *records: dict[str, Any]) -> Any:
    """Every record may be repeated after an answer that was lost. The run then."""
    scribe.write(records)
    again = Scribe(scribe.client, scribe.run, scribe.run_id, scribe.folder)
    again.write(records)
    return scribe.client.get_run(scribe.run_id)


def test_describing_again_keeps_what_was_said_and_adds_the_rest(scribe: Scribe) -> None:
    many = {f"p{number}": str(number) for number in range(2 * MAX_PARAMS + 1)}
    twice(scribe, {"op": "params", "params": {"model.phi": "0", **many}})
    run = twice(scribe, {"op": "params", "params": {"model.phi": "1", "long": "x" * 9999}})
    assert run.data.params == many | {"model.phi": "0", "long": "x" * MAX_PARAM_CHARS}


def test_tags_are_replaced(scribe: Scribe) -> None:
    twice(scribe, {"op": "tags", "tags": {"commit": "a"}})
    assert twice(scribe, {"op": "tags", "tags": {"commit": "b"}}).data.tags["commit"] == "b"


def test_records_keep_their_order(scribe: Scribe) -> None:
    end = {"op": "end", "status": "KILLED", "outcome": "interrupted", "time_ms": 5}
    run = twice(scribe, end, {"op": "begin", "time_ms": 6})
    assert run.info.status == "RUNNING"
    run = twice(scribe, end | {"status": "FINISHED", "outcome": "finished", "time_ms": 7})
    assert (run.info.status, run.info.end_time) == ("FINISHED", 7)
    assert run.data.tags[OUTCOME] == "finished"
    # What an earlier process could not send until now changes nothing.
    run = twice(scribe, end, {"op": "begin", "time_ms": 6})
    assert (run.info.status, run.info.end_time) == ("FINISHED", 7)
    assert run.data.tags[OUTCOME] == "finished"


def test_earlier_tags_and_texts_do_not_replace_later_ones(scribe: Scribe, tmp_path: Path) -> None:
    twice(scribe, {"op": "tags", "tags": {"hours": "15"}, "time_ms": 20})
    twice(scribe, {"op": "text", "to": "events.json", "text": "late", "time_ms": 20})
    late = {"op": "tags", "tags": {"hours": "5"}, "time_ms": 10}
    run = twice(scribe, late, {"op": "text", "to": "events.json", "text": "early", "time_ms": 10})
    assert run.data.tags["hours"] == "15"
    found = scribe.client.download_artifacts(scribe.run_id, "events.json", str(tmp_path))
    assert Path(found).read_text() == "late"


@pytest.mark.parametrize("file", ["../outside.txt", "/etc/hostname", "a/../../outside.txt"])
def test_files_outside_the_records_are_not_sent(scribe: Scribe, tmp_path: Path, file: str) -> None:
    """Spools are taken over from where checkpoints lie, and others may write there."""
    scribe.folder = tmp_path / "records"
    scribe.folder.mkdir()
    (tmp_path / "outside.txt").write_text("private")
    with pytest.raises(MlflowException, match="outside the run's records"):
        scribe.write([{"op": "file", "file": file, "to": "stolen.txt"}])
    assert scribe.client.list_artifacts(scribe.run_id) == []


def test_models_of_checkpoints_that_are_gone_are_removed(scribe: Scribe) -> None:
    for step in (10, 20):
        twice(
            scribe,
            {"op": "checkpoint", "step": step, "time_ms": 1, "uri": "s3://b", "dataset": {},
             "metrics": {"val/AP": 0.1}, "best_by": "val/AP"},
        )  # fmt: skip
    twice(scribe, {"op": "kept", "steps": [20, 30]})
    assert [model.tags[STEP] for model in models_of(scribe)] == ["20"]


def test_model_of_an_evaluation_that_was_made_twice_has_the_runs_own_value(scribe: Scribe) -> None:
    """After a kill it is made again, on a GPU with other last digits: the curve has one point."""
    twice(scribe, {"op": "metrics", "step": 9, "time_ms": 5, "metrics": {"val/AP": 0.25}})
    twice(
        scribe,
        {"op": "checkpoint", "step": 9, "time_ms": 8, "uri": "s3://b", "dataset": {},
         "metrics": {"val/AP": 0.2500001}, "best_by": "val/AP"},
    )  # fmt: skip
    history = scribe.client.get_metric_history(scribe.run_id, "val/AP")
    assert [(m.step, m.timestamp, m.value) for m in history] == [(9, 5, 0.25)]


def test_artifacts(scribe: Scribe, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "curve.png").write_bytes(b"png")
    twice(
        scribe,
        {"op": "text", "to": "eval/per_class.json", "text": "{}"},
        {"op": "file", "file": "figures/curve.png", "to": "figures/curve.png"},
        {"op": "file", "file": "figures/of_a_lost_node.png", "to": "figures/of_a_lost_node.png"},
    )
    listed = [f.path for f in scribe.client.list_artifacts(scribe.run_id, "figures")]
    assert listed == ["figures/curve.png"]
    found = scribe.client.download_artifacts(scribe.run_id, "eval/per_class.json", str(tmp_path))
    assert Path(found).read_text() == "{}"


def test_datasets_are_inputs_of_the_run_once(scribe: Scribe) -> None:
    record = {
        "op": "dataset", "context": "validation", "name": "coco/instances_val", "digest": "abc",
        "source": "s3://data/coco/instances_val.json", "profile": {"images": 5000},
    }  # fmt: skip
    [found] = twice(scribe, record).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("coco/instances_val", "abc")
    assert json.loads(found.dataset.profile) == {"images": 5000}
    assert [tag.value for tag in found.tags] == ["validation"]


def test_kept_checkpoint_is_a_model_with_its_metrics_step_and_data(scribe: Scribe) -> None:
    scores = {"val/AP": 0.25, "val/AP50": 0.5}
    record = {
        "op": "checkpoint", "step": 40, "time_ms": 777, "uri": "s3://b/run/step_00000040",
        "metrics": scores, "dataset": {"name": "coco/instances_val", "digest": "abc"},
        "best_by": "val/AP",
    }  # fmt: skip
    twice(
        scribe,
        {"op": "metrics", "step": 40, "time_ms": 555, "metrics": scores},
        record,
        record | {"step": 80, "uri": "s3://b/run/step_00000080"},
        {"op": "dropped", "step": 80},
    )
    [model] = models_of(scribe)
    assert model.tags[STEP] == "40"
    assert model.tags[URI] == "s3://b/run/step_00000040"
    assert model.tags[EXTERNAL] == "true"
    assert model.status == "READY"
    assert {(m.key, m.value, m.step, m.dataset_digest) for m in model.metrics} == {
        ("val/AP", 0.25, 40, "abc"), ("val/AP50", 0.5, 40, "abc"),
    }  # fmt: skip
    history = scribe.client.get_metric_history(scribe.run_id, "val/AP")
    # The model's metric is the run's own, not a second one at another time.
    assert [(m.step, m.timestamp) for m in history if m.step == 40] == [(40, 555)]


def test_best_and_last_of_the_kept_checkpoints_are_marked(scribe: Scribe) -> None:
    for step, value in ((10, 0.1), (20, 0.3), (30, 0.2)):
        record = {
            "op": "checkpoint", "step": step, "time_ms": step, "uri": f"s3://b/{step}",
            "metrics": {"val/AP": value, "val/AP50": 1 - value}, "dataset": {}, "best_by": "val/AP",
        }  # fmt: skip
        twice(scribe, record)
    roles = {model.tags[STEP]: model.tags.get(ROLE) for model in models_of(scribe)}
    assert roles == {"10": "", "20": "best", "30": "last"}


def models_of(scribe: Scribe) -> list[LoggedModel]:
    """All LoggedModels of the run."""
    experiment = scribe.client.get_run(scribe.run_id).info.experiment_id
    found = scribe.client.search_logged_models([experiment])
    return [model for model in found if model.source_run_id == scribe.run_id]
