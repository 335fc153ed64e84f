"""A training job in the background, to be watched and disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from helpers import Done, command, descendants, environment


class Job:
    """A job in a process of its own. Its output is appended, so that resumptions follow."""

    script = "train.py"

    def __init__(self, output: Path, *arguments: str, **env: str) -> None:
        self.output = output
        output.mkdir(exist_ok=True)
        self.log = (output / "stdout.txt").open("ab")
        self.began = self.log.tell()
        self.process = subprocess.Popen(
            command(*arguments, "--output", str(output), "--json", job=self.script),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment(**env),
            cwd=output,
        )

    def workers(self) -> list[int]:
        return self.below("RayTrainWorker")

    def raylets(self) -> list[int]:
        return self.below("/raylet/raylet ")

    def below(self, part: str) -> list[int]:
        """Processes of the job whose command line has `part`."""
        return [pid for pid, line in descendants(self.process.pid) if part in line]

    def text(self) -> str:
        """What this process printed."""
        return Path(self.log.name).read_bytes()[self.began :].decode()

    def step(self) -> int:
        """Of the newest checkpoint in the output folder."""
        found = self.output.glob("artifacts/*/artifacts/checkpoints/step_*/meta.json")
        return max((int(path.parent.name.removeprefix("step_")) for path in found), default=0)

    def wait_for(self, what: Callable[[], object], timeout_s: float = 240) -> None:
        end = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < end, f"waited {timeout_s} s in vain:\n{self.text()}"
            assert self.process.poll() is None, self.text()
            time.sleep(0.05)

    def finish(self, timeout_s: float = 300) -> Done:
        code = self.process.wait(timeout_s)
        return Done(code, self.text(), "")

    def kill(self) -> None:
        """kill -9 of the driver; returns when all that belonged to it is gone."""
        left_over = [pid for pid, _ in descendants(self.process.pid)]
        self.process.kill()
        self.process.wait()
        end = time.monotonic() + 60
        while any(training(pid) for pid in left_over):
            assert time.monotonic() < end, "workers outlived their driver"
            time.sleep(0.1)
        for pid in left_over:  # what Ray itself leaves behind when its driver is killed
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)


def training(pid: int) -> bool:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"RayTrainWorker" in line or b"ray::Trial" in line


def assert_same(disturbed: Done, undisturbed: Done, *, tolerance: float = 0.0) -> None:
    """The same weights and average, and each step once with the value it has undisturbed."""
    assert disturbed.code == 0, disturbed.out
    steps = undisturbed.report["step"]
    assert disturbed.report["step"] == steps
    history, expected = disturbed.history(), undisturbed.history()
    assert [step for step, _ in history] == list(range(1, steps + 1))
    a, b = disturbed.weights(), undisturbed.weights()
    if not tolerance:
        assert history == expected
        assert [key for key in b if not torch.equal(a[key], b[key])] == []
        return
    far = {key: float((a[key] - b[key]).abs().max()) for key in b if b[key].is_floating_point()}
    assert max(far.values()) < tolerance, max(far, key=lambda key: far[key])
    assert (
        max(abs(x - y) / abs(y) for (_, x), (_, y) in zip(history, expected, strict=True))
        < tolerance
    )
