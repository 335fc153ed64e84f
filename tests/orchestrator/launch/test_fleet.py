from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from orchestrator.errors import ClusterError, ConfigError, DataError, GaveUpError
from orchestrator.launch.crew import Crew, threads_for
from orchestrator.launch.fleet import _fit, _Losses, _own_sigterm, work_through
from orchestrator.launch.packed_model import PackedModel
from orchestrator.launch.ray_runtime import Cluster

from .test_export_job import checkpoint

HERE = Crew(workers=0)


def squares() -> Callable[[int], int]:
    return lambda task: task * task


def test_each_task_is_answered_once_in_order() -> None:
    assert list(work_through(range(4), squares, HERE)) == [(0, 0), (1, 1), (2, 4), (3, 9)]


def test_tasks_are_taken_one_by_one() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(1_000_000):
            taken.append(number)
            yield number

    working = work_through(tasks(), squares, HERE)
    assert [next(working)[0] for _ in range(3)] == [0, 1, 2]
    assert len(taken) == 3


def test_nothing_is_loaded_for_no_tasks() -> None:
    def make() -> Callable[[int], int]:
        raise AssertionError("loaded")

    assert list(work_through([], make, HERE)) == []
    assert list(work_through([], make, Crew(workers=1000))) == []


def test_threads_are_the_crews_while_it_works() -> None:
    before = torch.get_num_threads()
    working = work_through(
        range(2), lambda: lambda task: torch.get_num_threads(), Crew(threads=before + 1)
    )
    assert next(working) == (0, before + 1)
    working.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": -1}, "--workers: expected at least 0, got -1"),
        ({"threads": 0}, "--threads-per-worker: expected at least 1, got 0"),
        ({"max_failures": -1}, "--max-failures: expected at least 0"),
        ({"cpus_per_worker": 0.0}, "--cpus-per-worker: expected more than 0"),
        ({"cpus_per_worker": 0.00001}, "--cpus-per-worker: expected at least 0.0001"),
        ({"cpus_per_worker": float("inf")}, "--cpus-per-worker: expected at least 0.0001, and fin"),
        ({"cpus_per_worker": float("nan")}, "--cpus-per-worker: expected more than 0"),
        ({"gpus_per_worker": -0.5}, "--gpus-per-worker: expected at least 0"),
        ({"gpus_per_worker": 1.5}, "--gpus-per-worker: expected 0, 0.0001 to 1, or a whole num"),
        ({"gpus_per_worker": 0.00001}, "--gpus-per-worker: expected 0, 0.0001 to 1"),
        ({"gpus_per_worker": float("inf")}, "--gpus-per-worker: expected 0, 0.0001 to 1"),
    ],
)
def test_crews_that_cannot_be(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Crew(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cpus", "threads"), [(0.5, 1), (2.9, 2), (float("inf"), 1), (float("nan"), 1)]
)
def test_a_thread_for_each_whole_core(cpus: float, threads: int) -> None:
    assert threads_for(cpus) == threads


def test_a_lost_node_counts_once() -> None:
    losses, counted = _Losses(), []
    for node, preempted in (
        (None, False), ("a", False), ("a", False), ("b", True), ("b", False), ("c", False),
        ("c", False),
    ):  # fmt: skip
        losses.add(node, preempted=preempted)
        counted.append(losses.failures({"c"}))
    assert counted == [1, 2, 2, 2, 2, 3, 4]
    assert losses.failures({"a", "b", "c"}) == 6  # as long as nobody knows


def test_what_a_signal_does_stays_the_callers() -> None:
    def mine(number: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with _own_sigterm():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("crew", "now", "workers", "gpus"),
    [
        (Crew(workers=None), 3, 3, 0.0),
        (Crew(workers=None), 0, 1, 0.0),
        (Crew(workers=None, gpus_per_worker=None), 0, 1, 1.0),
        (Crew(workers=4, gpus_per_worker=0.5), 0, 4, 0.5),
        (Crew(workers=8), 0, 8, 0.0),
    ],
)
def test_a_crew_fits_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, crew: Crew, now: int, workers: int, gpus: float
) -> None:
    """Of 8 CPUs and 2 GPUs that an autoscaler may bring."""
    monkeypatch.setattr("orchestrator.launch.ray_runtime.room_for", lambda cpus, gpus: now)
    cluster = Cluster(False, cpus=8, gpus=2, nodes=0, address="", grows=True)
    fitted = _fit(crew, cluster)
    assert (fitted.workers, fitted.gpus_per_worker) == (workers, gpus)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.launch.ray_runtime.room_for", lambda cpus, gpus: 3)
    cluster = Cluster(True, cpus=8, gpus=0, nodes=1, address="")
    with pytest.raises(ClusterError, match=r"--workers: expected at most 3 with 1 CPU.* got 4;"):
        _fit(Crew(workers=4), cluster)


def test_a_packed_model_is_the_checkpoint(tmp_path: Path) -> None:
    from model.predictor import Predictor

    folder, detector = checkpoint(tmp_path / "step_00000001")
    other, _ = checkpoint(tmp_path / "step_00000002")
    packed = PackedModel.of(folder)
    assert len(packed.sha256) == 64
    assert packed.sha256 == PackedModel.of(folder).sha256 != PackedModel.of(other).sha256
    with packed.unpacked() as copy:
        loaded = Predictor.load(copy, "cpu")
    ours, theirs = loaded.detector.state_dict(), detector.state_dict()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.integration
@pytest.mark.slow
def test_a_killed_worker_loses_and_doubles_nothing(tmp_path: Path) -> None:
    marks, taken, said = str(tmp_path), Counter[str](), list[str]()

    def make() -> Callable[[int], tuple[int, int]]:
        def answer(task: int) -> tuple[int, int]:
            if task in (5, 11) and not os.path.exists(f"{marks}/{task}"):
                with open(f"{marks}/{task}", "w"):
                    os.kill(os.getpid(), signal.SIGKILL)
            return task * task, os.getpid()

        return answer

    def tasks() -> Iterator[int]:
        for number in range(40):
            taken["given"] += 1
            # What two workers have, and what those who died had, which comes last.
            assert taken["given"] - taken["done"] <= 2 * 2 + len(said) * 2 + 1
            yield number

    found: dict[int, int] = {}
    pids: set[int] = set()
    for task, (answer, pid) in work_through(tasks(), make, Crew(workers=2), say=said.append):
        assert task not in found
        found[task] = answer
        pids.add(pid)
        taken["done"] += 1
    assert found == {number: number * number for number in range(40)}
    assert len(said) == 2
    assert all("its process died; another takes its place" in text for text in said)
    assert len(pids) > 2
    assert not [pid for pid in pids if _runs(pid)]


@pytest.mark.integration
@pytest.mark.slow
def test_errors_end_the_work() -> None:
    def unreadable() -> Callable[[int], int]:
        def answer(task: int) -> int:
            raise DataError(f"task {task}", "a number", "another", "correct it")

        return answer

    def deadly() -> Callable[[int], int]:
        return lambda task: os.kill(os.getpid(), signal.SIGKILL) or 0

    with pytest.raises(DataError, match=r"task \d: expected a number, got another; correct it"):
        list(work_through(range(3), unreadable, Crew(workers=2)))

    def deadly_at_0() -> Callable[[int], int]:
        def answer(task: int) -> int:
            time.sleep(0.3)  # what was answered before is on its way
            return task or deadly()(task)

        return answer

    done: list[int] = []
    one = Crew(workers=1, max_failures=2)
    working = work_through(range(3), deadly_at_0, one, say=lambda text: None)
    with pytest.raises(GaveUpError) as gave_up:
        done.extend(task for task, _ in working)
    assert str(gave_up.value.cause) == "worker 2: its process died, at 0"
    assert sorted(done) == [1, 2]  # before it is tried again
    with pytest.raises(ClusterError, match="expected at most"):
        list(work_through(range(3), squares, Crew(workers=1000)))


def _runs(pid: int) -> bool:
    try:
        return "ray::" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
