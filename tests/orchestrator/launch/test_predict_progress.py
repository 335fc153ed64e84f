from __future__ import annotations

import io

from orchestrator.launch.predict_progress import PredictProgress
from orchestrator.storage.predictions import Failure, Part


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def part(images: int, failed: int = 0) -> Part:
    return Part(0, images, 0, 0, "cpu", (Failure("a.jpg", "broken"),) * failed)


def test_the_line_says_how_far_how_fast_and_how_long() -> None:
    clock, out = Clock(), io.StringIO()
    progress = PredictProgress(images=1000, done=400, frames=False, stream=out, clock=clock)
    assert progress.line() == "images 400/1000"
    clock.now += 10
    progress.add(100, part(100, failed=2))
    assert progress.line() == "images 500/1000  failed 2  img/s 10.0  ETA 0:50"
    assert out.getvalue().strip() == progress.line()
    clock.now += 1  # too soon for another line
    progress.add(100, part(100))
    assert len(out.getvalue().splitlines()) == 1
    progress.add(400, part(400))
    assert out.getvalue().splitlines()[-1].startswith("images 1000/1000  failed 2  img/s ")
    assert "ETA" not in out.getvalue().splitlines()[-1]


def test_the_speed_is_that_of_late() -> None:
    clock = Clock()
    progress = PredictProgress(
        images=10**6, done=0, frames=False, stream=io.StringIO(), clock=clock
    )
    clock.now += 1000  # to load
    for _ in range(100):
        clock.now += 2
        progress.add(20, part(20))
    assert progress.img_per_s == 10.0


def test_how_long_videos_are_nobody_knows() -> None:
    clock = Clock()
    progress = PredictProgress(images=3, done=0, frames=True, stream=io.StringIO(), clock=clock)
    clock.now += 10
    progress.add(1, part(200))
    assert progress.line() == "files 1/3  frames 200  img/s 20.0"
