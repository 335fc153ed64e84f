"""Training across hosts of their own network: one dies, one joins, a cable is pulled."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import ROOT, Done, hosts, settings, train
from helpers.jobs import assert_same

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]
# Two groups of 4: each worker runs whole groups, so one worker and two compute the same sums.
COMMON = settings(
    train__bn_group=4, launch__threads_per_worker=1, launch__grow_every_s=5,
    model__image_size_px=128, data__shapes__size_px=128, train__channels_last="false",
    optim__lr_per_64=0.05,
)  # fmt: skip
TOLERANCE = 1e-4


class Training:
    """A job whose driver runs on the head of a network."""

    def __init__(self, network: hosts.Network, *arguments: str) -> None:
        self.network, self.log = network, network.folder / "driver.log"
        out = network.folder / "out"
        out.mkdir()
        self.checkpoints = out / "checkpoints"
        self.driver = network.driver(
            sys.executable, str(ROOT / "jobs" / "train.py"), *COMMON, *arguments, "--output", str(out),
            "--set", f"checkpoint.uri={self.checkpoints}", "--json", log=self.log,
        )  # fmt: skip

    def text(self) -> str:
        return self.log.read_text()

    def step(self) -> int:
        found = self.checkpoints.glob("*/step_*/meta.json")
        return max((int(path.parent.name.removeprefix("step_")) for path in found), default=0)

    def wait_for(self, what: Callable[[], object], timeout_s: float = 180) -> float:
        """Seconds it took."""
        began = time.monotonic()
        while not what():
            assert time.monotonic() - began < timeout_s, f"in vain:\n{self.text()}"
            assert self.driver.poll() is None, self.text()
            time.sleep(0.05)
        return time.monotonic() - began

    def moves_on(self, timeout_s: float = 180) -> float:
        now = self.step()
        return self.wait_for(lambda: self.step() > now, timeout_s)

    def finish(self) -> Done:
        try:
            self.driver.wait(400)
        except subprocess.TimeoutExpired:
            self.driver.kill()
        return Done(self.driver.returncode, self.text(), "")


@pytest.fixture
def network(tmp_path: Path) -> Iterator[hosts.Network]:
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    with hosts.network(tmp_path) as made:
        made.add()
        made.add()
        yield made


def undisturbed(folder: Path, steps: int) -> Done:
    folder.mkdir()
    done = train(folder, *COMMON, "--steps", str(steps), "--launcher", "local")
    assert done.code == 0, done.err
    return done


@pytest.mark.parametrize(
    ("joins", "steps"),
    [
        pytest.param(False, 250, marks=pytest.mark.slow),
        pytest.param(True, 500, marks=pytest.mark.chaos),
    ],
)
def test_a_node_is_lost(network: hosts.Network, tmp_path: Path, joins: bool, steps: int) -> None:
    """2 -> 1 (-> 2) workers; the curve is that of one worker that was never disturbed."""
    job = Training(network, "--workers", "1:2", "--steps", str(steps))
    job.wait_for(lambda: job.step() >= 30)
    network.hosts[1].kill()
    assert job.moves_on() < 90, "the loss of a node costs more than it should"
    assert "training goes on with 1 worker(s), 2 before" in job.text()
    if joins:
        network.add()
        job.wait_for(lambda: "training goes on with 2 worker(s), 1 before" in job.text())
    done = job.finish()
    assert_same(done, undisturbed(tmp_path / "undisturbed", steps), tolerance=TOLERANCE)
    assert done.report["interruptions"] == {
        "failures": 1, "preemptions": 0, "resizes": int(joins), "resumptions": 0,
    }  # fmt: skip


@pytest.mark.chaos
def test_a_cable_is_pulled_for_30_s(network: hosts.Network, tmp_path: Path) -> None:
    steps = 600
    job = Training(network, "--workers", "1:2", "--steps", str(steps))
    job.wait_for(lambda: job.step() >= 30)
    network.hosts[1].link("down")
    time.sleep(30)
    network.hosts[1].link("up")
    assert job.moves_on() < 60
    done = job.finish()
    assert_same(done, undisturbed(tmp_path / "undisturbed", steps), tolerance=TOLERANCE)


@pytest.mark.chaos
def test_a_cable_is_pulled_for_6_s(network: hosts.Network, tmp_path: Path) -> None:
    """Nothing restarts: everybody waits."""
    steps = 300
    job = Training(network, "--workers", "2", "--steps", str(steps))
    job.wait_for(lambda: job.step() >= 30)
    network.hosts[1].link("down")
    time.sleep(6)
    network.hosts[1].link("up")
    done = job.finish()
    assert_same(done, undisturbed(tmp_path / "undisturbed", steps), tolerance=TOLERANCE)
    assert done.report["interruptions"]["failures"] == 0


@pytest.mark.chaos
def test_a_node_goes_with_a_notice(network: hosts.Network, tmp_path: Path) -> None:
    """A drained node: a checkpoint at once, no failure, and training goes on elsewhere."""
    steps = 800
    job = Training(
        network, "--workers", "1:2", "--steps", str(steps),
        "--set", "train.checkpoint_every={steps: 200}",
    )  # fmt: skip
    job.wait_for(lambda: "img/s" in job.text())
    time.sleep(5)
    network.drain(network.hosts[1], deadline_s=20)
    job.wait_for(lambda: "a node is about to be taken away" in job.text())
    job.wait_for(lambda: job.step() % 200, 30)
    time.sleep(20)
    network.hosts[1].kill()
    done = job.finish()
    assert_same(done, undisturbed(tmp_path / "undisturbed", steps), tolerance=TOLERANCE)
    counts = done.report["interruptions"]
    assert (counts["failures"], counts["preemptions"]) == (0, 1)
