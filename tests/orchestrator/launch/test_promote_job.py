from __future__ import annotations

import io
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from model.network.detector import Detector
from model.training.state import read_network
from orchestrator.config.cli import PromoteOptions, PromoteRequest, parse_promote
from orchestrator.errors import ConfigError, UserError
from orchestrator.launch.promote_job import run_promote_job
from orchestrator.records.package import Row
from orchestrator.records.tracker import CHECKPOINTS, OUTCOME, Tracker

from .test_export_job import checkpoint


def answers_as_expected(folder: Path, image: bytes) -> list[Row]:
    """Without a new process; `test_registry` tries that."""
    from model.predictor import Predictor
    from orchestrator.records.package import CHECKPOINT

    (found,) = Predictor.load(folder / CHECKPOINT, "cpu").predict([image], score_threshold=0.0)
    numbers = zip(found.boxes_xywh.tolist(), found.scores, found.category_ids, strict=True)
    return [(*box, float(score), int(category)) for box, score, category in numbers]


@pytest.fixture
def finished(tracker: Tracker, run_id: str, tmp_path: Path) -> str:
    place = tmp_path / "checkpoints"
    place.mkdir()
    folder, _ = checkpoint(place / "step_00000001")
    assert Detector(read_network(folder))
    tracker.client.set_tag(run_id, CHECKPOINTS, place.as_uri())
    tracker.client.set_tag(run_id, OUTCOME, "finished")
    tracker.client.set_terminated(run_id)
    return run_id


def test_promoted_then_unchanged(tracker: Tracker, finished: str) -> None:
    request = PromoteRequest(finished, "job", checkpoint="last", tracking_uri=tracker.uri)
    for dry_run, status in ((True, "dry run"), (False, "promoted"), (False, "unchanged")):
        out = io.StringIO()
        done = run_promote_job(request, PromoteOptions(dry_run, False), out, answers_as_expected)
        assert (done.code, done.report["status"]) == (0, status)
        assert all(gate["passed"] for gate in done.report["gates"])
        assert "pass  the run finished" in out.getvalue()
    assert "models:/job@champion" in out.getvalue()
    assert len(MlflowClient(tracker.uri).search_model_versions("name='job'")) == 1


def test_a_refusal_shows_every_gate_first(tracker: Tracker, finished: str) -> None:
    request = PromoteRequest(
        finished, "refused", "last", require=(("val/AP", 0.3),), tracking_uri=tracker.uri
    )
    out = io.StringIO()
    with pytest.raises(ConfigError, match=r"1 of 5 failed \(val/AP >= 0.3\)"):
        run_promote_job(request, PromoteOptions(False, False), out, answers_as_expected)
    shown = out.getvalue()
    assert "FAIL  missing" in shown
    assert "pass  loads without pickle" in shown
    assert not MlflowClient(tracker.uri).search_registered_models("name='refused'")


def test_the_trackers_place_is_found(
    tracker: Tracker, finished: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = PromoteRequest(finished, "elsewhere", "last")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=f"no file {tmp_path}/runs/mlflow.db"):
        run_promote_job(request, PromoteOptions(True, False), io.StringIO(), answers_as_expected)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    assert (
        run_promote_job(
            request, PromoteOptions(True, False), io.StringIO(), answers_as_expected
        ).code
        == 0
    )


def test_flags() -> None:
    request, options = parse_promote(
        "", ["abc", "--name", "n", "--require", "val/AP>=0.3", "--require", "val/AP50 >= .5",
             "--allow-worse", "--alias", "staging", "--checkpoint", "20", "--dry-run"],
    )  # fmt: skip
    assert request == PromoteRequest(
        "abc", "n", "20", "staging", (("val/AP", 0.3), ("val/AP50", 0.5)), allow_worse=True
    )
    assert options == PromoteOptions(dry_run=True, json=False)


@pytest.mark.parametrize("text", ["val/AP", "val/AP>0.3", "val/AP>=", ">=3", "val/AP>=nan", "a>=b"])
def test_requirements_that_say_nothing(text: str) -> None:
    with pytest.raises(ConfigError, match="METRIC>=VALUE"):
        parse_promote("", ["abc", "--name", "n", "--require", text])
