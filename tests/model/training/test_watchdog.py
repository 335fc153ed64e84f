"""Who is waited for, and for how long."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.training.watchdog import EXIT_CODE, Report, Watchdog, _aged, verdict


def report(rank: int, step: int, phase: str, age_s: float, silent_s: float = 0.0) -> Report:
    return Report(rank, f"host{rank}", step, phase, age_s, silent_s)


@pytest.mark.parametrize(
    ("me", "other", "expected"),
    [
        # Nobody has waited long.
        (report(0, 7, "step", 50), report(1, 6, "step", 55), None),
        # Stuck in the step before, or in the same one before it reads.
        (report(0, 7, "step", 61), report(1, 6, "step", 70), "step 8: rank 1 on host1 did not"),
        (report(0, 7, "step", 61), report(1, 7, "data", 70), None),  # it fetches images
        (report(0, 7, "step", 700), report(1, 7, "data", 701), "rank 1 on host1 did not"),
        (report(0, 7, "evaluate", 61), report(1, 7, "evaluate", 61), None),  # rank 0 scores
        (report(0, 7, "evaluate", 601), report(1, 7, "evaluate", 9), "not done with evaluate"),
        # All are there and none goes on.
        (report(0, 7, "step", 61), report(1, 7, "step", 61), "step 8: all 2 ranks wait"),
        # Whoever fell silent is named, whatever it was doing.
        (report(0, 7, "step", 61), report(1, 7, "data", 61, 31), "nothing was heard of it for 31"),
        (report(0, 7, "evaluate", 61), report(1, 7, "step", 61, 31), "did not arrive: nothing"),
        (report(0, 7, "step", 50), report(1, 7, "data", 61, 31), None),
        # The one that is waited for does not accuse those that wait.
        (report(1, 7, "data", 100), report(0, 7, "step", 100), None),
        (report(1, 6, "step", 100), report(0, 7, "step", 100), None),
        # While it scores, a rank may be unable even to report.
        (report(1, 7, "evaluate", 100), report(0, 7, "evaluate", 100, 99), None),
    ],
)
def test_verdict(me: Report, other: Report, expected: str | None) -> None:
    said = verdict(me, [other], timeout_s=60, patience_s=600)
    assert (said is None) == (expected is None), said
    assert expected is None or expected in str(said)


def test_slow_steps_are_not_stuck_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience until the first step is done, then the timeout, or five times the longest step."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watchdog = Watchdog(rank=0, world_size=1, timeout_s=60, patience_s=600, say=print)
    seen = []
    for step, seconds in enumerate((100.0, 5.0, 30.0, 200.0)):
        watchdog.arrive(step, "data")
        watchdog.arrive(step, "step")
        seen.append(watchdog._timeout_s())
        now[0] += seconds
    watchdog.arrive(4, "data")
    assert [*seen, watchdog._timeout_s()] == [600, 60, 60, 150, 600]


def test_a_reader_without_time_accuses_nobody() -> None:
    """What was heard when reading last found time is not silent, however long ago that was."""
    heard = report(1, 7, "step", 3)
    assert _aged(heard, elapsed_s=40, unheard_s=1) == report(1, 7, "step", 43)
    assert _aged(heard, elapsed_s=40, unheard_s=39) == report(1, 7, "step", 43, 39)


def _wait(rank: int, folder: str, how: str, late: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{Path(folder, 'port').read_text()}",
        rank=rank, world_size=2, timeout=timedelta(seconds=120),
    )  # fmt: skip
    said = Path(folder) / f"said-{rank}"
    watchdog = Watchdog(
        rank=rank, world_size=2, timeout_s=8, patience_s=60, say=lambda text: _write(said, text)
    )
    for step in range(3):
        watchdog.arrive(step, "data")
        if step == 2 and rank == late:
            (Path(folder) / "ready").touch()
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            watchdog.arrive(step - 1, "step")
            time.sleep(100)
        watchdog.arrive(step, "step")
        dist.all_reduce(torch.zeros(1))


def _write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("how", "late"),
    [
        ("stopped", 1),
        ("stuck", 0),
        pytest.param("stopped", 0, marks=pytest.mark.slow),
        pytest.param("stuck", 1, marks=pytest.mark.slow),
    ],
)
def test_the_rank_that_does_not_arrive_is_named(tmp_path: Path, how: str, late: int) -> None:
    """Also rank 0, in whose process the store lives that all report to."""
    from helpers import free_ports

    (tmp_path / "port").write_text(str(free_ports(1)[0]))
    context = mp.get_context("spawn")
    ranks = [
        context.Process(target=_wait, args=(rank, str(tmp_path), how, late)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    try:
        waiting = 1 - late
        ranks[waiting].join(90)
        assert ranks[waiting].exitcode == EXIT_CODE
        said = (tmp_path / f"said-{waiting}").read_text()
        assert said.startswith(f"step 3: rank {late} ")
        assert ("nothing was heard" if how == "stopped" else "it is in step 2 (step)") in said
        assert not (tmp_path / f"said-{late}").exists()
    finally:
        for process in ranks:
            process.kill()
            process.join()
