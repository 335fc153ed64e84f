"""Failures, preemptions and changes of size: told apart, counted over a run's whole life."""

from __future__ import annotations

import pytest
import ray.exceptions
from ray.train.v2.api.exceptions import WorkerGroupError

from orchestrator.errors import DataError, StorageError
from orchestrator.launch.interruptions import Interruptions
from orchestrator.launch.mailbox import FailureNotes, WorkerLost, describe_failures, root_cause


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def tags() -> dict[str, str]:
    return {}


@pytest.fixture
def seen(told: list[str], tags: dict[str, str]) -> Interruptions:
    return Interruptions(told.append, tags.update)


def test_nothing_happened(seen: Interruptions, told: list[str], tags: dict[str, str]) -> None:
    seen.started(4)
    assert (seen.describe(), told, tags) == (None, [], {})


def test_a_failure_is_counted_once_however_many_ranks_report_it(seen: Interruptions) -> None:
    seen.started(2)
    seen.failed("rank 1: its process died", preempted=False)
    seen.failed("rank 0: lost its connection", preempted=False)
    seen.started(2)
    assert seen.counts() == {"failures": 1, "preemptions": 0, "resizes": 0, "resumptions": 0}
    assert seen.describe() == "1 failure(s); the last: rank 1: its process died"


def test_a_rank_that_did_not_arrive_is_the_reason(seen: Interruptions, told: list[str]) -> None:
    seen.started(2)
    seen.blamed("step 7: rank 1 on here did not arrive")
    seen.failed("rank 0: its process died", preempted=False)
    assert seen.last == "step 7: rank 1 on here did not arrive"
    seen.started(2)
    seen.failed("rank 0: its process died", preempted=False)
    assert seen.last == "rank 0: its process died"


@pytest.mark.parametrize("how", ["ray knows", "notice before", "notice and no error"])
def test_a_preemption_is_no_failure(seen: Interruptions, how: str) -> None:
    seen.started(2)
    if how != "ray knows":
        seen.noticed()
    if how != "notice and no error":
        seen.failed("rank 1: its process died", preempted=how == "ray knows")
    seen.started(1)
    assert (seen.failures, seen.preemptions, seen.resizes) == (0, 1, 0)


def test_growing_is_neither(seen: Interruptions, told: list[str]) -> None:
    seen.started(1)
    seen.started(2)
    assert (seen.failures, seen.preemptions, seen.resizes) == (0, 0, 1)
    assert told == ["training goes on with 2 worker(s), 1 before"]


def test_the_count_goes_on_in_another_process(
    seen: Interruptions, tags: dict[str, str], told: list[str]
) -> None:
    seen.started(2)
    seen.failed("rank 1: its process died", preempted=False)
    later = Interruptions(told.append, tags.update)
    later.recall(tags)
    later.resumed()
    later.started(2)
    later.failed("rank 0: its process died", preempted=False)
    assert later.counts() == {"failures": 2, "preemptions": 0, "resizes": 0, "resumptions": 1}
    assert later.here == 1, "the budget is this process's"
    assert tags["effdet.failures"] == "2"
    assert tags["effdet.last_interruption"] == "rank 0: its process died"


def test_whoever_died_is_named_not_whoever_noticed() -> None:
    reset = "[pair.cc:545] Read error [10.0.0.2]:5292: Connection reset by peer. This is typically"
    died = WorkerLost("worker 1 is dead", ray.exceptions.RayActorError())
    assert describe_failures({0: RuntimeError(reset), 1: died}) == "rank 1: its process died"
    assert describe_failures({0: RuntimeError(reset)}) == "rank 0: lost its connection to 10.0.0.2"
    data = DataError("image 7", "a picture", "noise", "repair it")
    assert describe_failures({3: data}).startswith("rank 3: image 7: expected a picture")
    memory = WorkerLost("x", ray.exceptions.OutOfMemoryError("the node was low on memory"))
    assert describe_failures({2: memory}) == "rank 2: killed because its node ran out of memory"


class Told:
    """In place of the mailbox's handle."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []
        self.put = self

    def remote(self, event: tuple[object, ...]) -> None:
        self.events.append(event)


def notes(*errors: Exception) -> list[tuple[object, ...]]:
    told = Told()
    FailureNotes(told).after_exception(None, dict(enumerate(errors)))
    return told.events


def test_the_controller_tells_failures_from_preemptions_and_mistakes() -> None:
    died = WorkerLost("worker 0 is dead", ray.exceptions.RayActorError())
    taken = WorkerLost("worker 0 is dead", ray.exceptions.RayActorError(preempted=True))
    away = StorageError("data", "to read s3://x", "no answer", "check it")
    assert notes(died) == [("failed", "rank 0: its process died", False)]
    assert notes(taken) == [("failed", "rank 0: its process died", True)]
    assert notes(away)[0][2] is False, "a storage may come back"
    # A mistake ends the run with its own line; nothing starts again.
    assert notes(DataError("image 7", "a picture", "noise", "repair it")) == []


def test_the_reason_is_found_below_what_ray_wraps_around_it() -> None:
    memory = ray.exceptions.OutOfMemoryError("the node was low on memory")
    group = WorkerGroupError("two workers failed", {1: WorkerLost("worker 1 is dead", memory)})
    assert root_cause(group) is memory


def test_waiting_for_room_is_said_once(told: list[str]) -> None:
    now = [0.0]
    seen = Interruptions(told.append, clock=lambda: now[0])
    for seconds in (0.0, 30.0, 61.0, 90.0, 200.0):
        now[0] = seconds
        seen.waiting()
    assert told == ["no workers yet: slow to start, or no room on the cluster (see ray status)"]
    seen.started(1)
    now[0] = 500.0
    seen.waiting()
    assert len(told) == 1
