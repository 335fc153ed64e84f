"""Processes killed at random moments: the run ends with the weights it would have had anyway."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from helpers import Done, settings, train
from helpers.jobs import Job, assert_same

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
SEED = 2026
SHORT, LONG = 2, 20


def arguments(kills: int) -> list[str]:
    """Steps enough for all kills to fall into the run."""
    limits = ("--set", "launch.max_failures=100", "--set", "launch.hang_timeout_s=8")
    one_thread = settings(launch__threads_per_worker=1)
    return [*one_thread, *limits, "--steps", str(400 + 120 * kills)]


@pytest.mark.chaos
@pytest.mark.parametrize("kills", [SHORT, LONG])
def test_kill_9_at_random(tmp_path: Path, kills: int) -> None:
    """Workers, raylets and drivers; whoever started the driver starts it again."""
    (tmp_path / "undisturbed").mkdir()
    undisturbed = train(tmp_path / "undisturbed", *arguments(kills), timeout_s=600)
    assert undisturbed.code == 0, undisturbed.err
    draw = random.Random(SEED)
    victims = ["worker", "raylet", "driver"][:kills]  # each at least once in the long run
    victims += [draw.choice(victims) for _ in range(kills - len(victims))]
    draw.shuffle(victims)
    job = Job(tmp_path / "disturbed", *arguments(kills))
    began, workers_killed, resumptions = 0, 0, 0
    for victim in victims:
        job.wait_for(partial(_trains_beyond, job, began))
        time.sleep(draw.uniform(0, 0.3))
        began = job.step()
        if victim == "worker":
            workers_killed += 1
            os.kill(draw.choice(job.workers()), signal.SIGKILL)
            continue
        if victim == "raylet":
            os.kill(job.raylets()[0], signal.SIGKILL)
            # It takes its workers along; the driver cannot go on without it and must say so soon.
            # (A worker that notices late may finish first: then there is nothing left to disturb.)
            code = job.process.wait(90)
            assert code != 2, job.text()
            if code == 0:
                break
            resumptions += 1
        else:
            job.kill()
            resumptions += 1
        job = Job(tmp_path / "disturbed", *arguments(kills))
    done: Done = job.finish(600)
    assert_same(done, undisturbed)
    assert done.report["interruptions"]["resumptions"] == resumptions
    assert done.report["interruptions"]["failures"] >= workers_killed


def _trains_beyond(job: Job, step: int) -> bool:
    return job.step() > step and bool(job.workers())


@pytest.mark.chaos
def test_a_worker_that_stands_still_is_replaced(tmp_path: Path) -> None:
    """SIGSTOP: nothing breaks, nothing moves. The others name it and the group starts again."""
    two = [*arguments(0), "--workers", "2", "--set", "train.bn_group=4"]
    (tmp_path / "undisturbed").mkdir()
    undisturbed = train(tmp_path / "undisturbed", *two)
    assert undisturbed.code == 0, undisturbed.err
    job = Job(tmp_path / "disturbed", *two)
    job.wait_for(lambda: job.step() > 10 and len(job.workers()) == 2)
    os.kill(max(job.workers()), signal.SIGSTOP)
    done = job.finish()
    assert_same(done, undisturbed)
    assert done.report["interruptions"]["failures"] == 1
    assert "did not arrive: nothing was heard of it" in done.report["last_interruption"]


@pytest.mark.chaos
def test_the_head_dies(tmp_path: Path) -> None:
    """Its cluster cannot be saved; the driver says so soon, and the same command goes on."""
    (tmp_path / "undisturbed").mkdir()
    undisturbed = train(tmp_path / "undisturbed", *arguments(0))
    assert undisturbed.code == 0, undisturbed.err
    job = Job(tmp_path / "disturbed", *arguments(0))
    job.wait_for(lambda: job.step() > 10 and job.workers())
    for pid in job.below("/gcs/gcs_server "):
        os.kill(pid, signal.SIGKILL)
    job.process.wait(180)
    done = Job(tmp_path / "disturbed", *arguments(0)).finish()
    assert_same(done, undisturbed)
