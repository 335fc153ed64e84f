from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config.schema import TrackingConfig, TrainJob
from orchestrator.launch.bookkeeping import EVENTS, Bookkeeper, dataset_facts
from orchestrator.launch.resolve import Derived, ResolvedJob, derive, resolve_job
from orchestrator.records.run import TrackedRun
from orchestrator.records.runs import Runs
from orchestrator.records.scribe import find_run
from orchestrator.records.tracker import Tracker
from orchestrator.storage.filesystems import open_place

COUNTS = ("effdet.failures", "effdet.preemptions", "effdet.resizes", "effdet.resumptions")


@pytest.fixture
def ready(job: TrainJob) -> tuple[ResolvedJob, Derived]:
    job = replace(job, tracking=TrackingConfig(experiment="tests", price_per_worker_hour=2.0))
    resolved, train, val = resolve_job(job)
    return resolved, derive(resolved, len(train), len(val))


def open_books(uri: str, resolved: ResolvedJob, said: list[str]) -> Bookkeeper:
    cards = [open_place(str(resolved.output / "records"), "test")]
    runs = Runs(uri, "tests", None, cards, say=said.append)
    run = runs.open(name=resolved.name, key=resolved.key(), resume="auto")
    run = replace(run, checkpoints_uri=str(resolved.output / "checkpoints" / run.run_key))
    return Bookkeeper(runs, run, resolved, step=lambda: 7, gpus_per_worker=0, say=said.append)


def tags(failures: int, resumptions: int = 0) -> dict[str, str]:
    counts = dict.fromkeys(COUNTS, "0")
    return counts | {
        "effdet.failures": str(failures), "effdet.resumptions": str(resumptions),
        "effdet.last_interruption": "rank 0: its process died",
    }  # fmt: skip


@pytest.fixture(params=["online", "offline"])
def uri(
    request: pytest.FixtureRequest,
    tracker: Tracker,
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    if request.param == "offline":
        monkeypatch.setattr("orchestrator.launch.bookkeeping.CLOSE_TIMEOUT_S", 0.2)
    return tracker.uri if request.param == "online" else f"http://127.0.0.1:{closed_port}"


def test_record_of_a_run_over_a_restart(
    ready: tuple[ResolvedJob, Derived], uri: str, tracker: Tracker
) -> None:
    """The same whether or not MLflow could be asked in between; at the end it has everything."""
    resolved, derived = ready
    said: list[str] = []
    facts = {"validation": dataset_facts(resolved.val, resolved.val.index(None))}
    first = open_books(uri, resolved, said)
    first.begin(Path(__file__).parents[3], derived, facts)
    first.usage.at_work(2)
    first.happened(tags(failures=1))
    first.journal.sender._closing.set()  # killed: nothing is closed, much is not sent
    first.journal.sender._given_up = True

    second = open_books(uri, resolved, said)
    assert second.run.run_key == first.run.run_key
    second.begin(Path(__file__).parents[3], derived, facts)
    assert second.recalled()["effdet.failures"] == "1"
    second.happened(tags(failures=1, resumptions=1))
    second.usage.close()
    trouble = second.finish("FINISHED", "finished", [("status", "finished | 1")], done=True)
    if uri != tracker.uri:
        assert trouble is not None
        assert "jobs/doctor.py --replay" in trouble
        from orchestrator.records.replay import replay

        sent = list(replay(str(resolved.output), tracking_uri=tracker.uri))
        assert [one.left for one in sent] == [0]
    else:
        assert trouble is None
    run_id = str(find_run(tracker.client, second.run))
    run = tracker.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["effdet.failures"] == "1"
    assert "| status | finished \\| 1 |" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics["events/failures"] == 1
    assert run.data.metrics["events/resumptions"] == 1
    assert run.data.metrics["usage/cost"] >= 0
    assert run.data.params["train.batch_size"] == "4"
    [dataset] = run.inputs.dataset_inputs
    assert dataset.dataset.digest == facts["validation"]["digest"]
    table = json.loads(str(tracker.read_artifact(run_id, EVENTS)))
    assert [row[1:3] for row in table["data"]] == [[7, "failures"], [7, "resumptions"], [7, "end"]]


def test_finished_run_is_not_gone_on_with(ready: tuple[ResolvedJob, Derived], uri: str) -> None:
    resolved, derived = ready
    first = open_books(uri, resolved, [])
    first.begin(Path(__file__).parents[3], derived, {})
    first.finish("FINISHED", "finished", [], done=True)
    second = open_books(uri, resolved, [])
    assert second.run.run_key != first.run.run_key
    assert isinstance(second.run, TrackedRun)
    second.journal.close(0.1)
    first.journal.close(0.1)
