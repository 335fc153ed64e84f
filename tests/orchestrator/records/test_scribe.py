from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities.logged_model import LoggedModel

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
    run = twice(scribe, end, {"op": "begin"})
    assert run.info.status == "RUNNING"
    run = twice(scribe, end | {"status": "FINISHED", "outcome": "finished"})
    assert (run.info.status, run.info.end_time) == ("FINISHED", 5)
    assert run.data.tags[OUTCOME] == "finished"


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
