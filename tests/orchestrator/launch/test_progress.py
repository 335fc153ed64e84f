from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from orchestrator.launch.progress import PLAIN_INTERVAL_S, Progress, duration, print_table

EVERYTHING = {
    "train/loss": 0.12345, "train/lr": 0.08, "val/AP": 0.3456, "val/AP50": 0.5,
    "perf/img_per_s": 123.45, "perf/step_s": 2.0, "perf/memory_gib": 3.21,
}  # fmt: skip


class Clock:
    """time.monotonic() that moves when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("orchestrator.launch.progress.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def progress(stream: io.StringIO) -> Iterator[Progress]:
    made = Progress(total_steps=200, steps_per_epoch=40, metric="val/AP", stream=stream)
    yield made
    made.close()


def test_line_holds_everything_in_order(progress: Progress) -> None:
    progress.log(50, EVERYTHING)
    assert progress.line() == (
        "step 50/200  epoch 1.2  loss 0.123  AP 0.346  AP50 0.500  img/s 123.5  lr 0.0800  "
        "ETA 5:00  mem 3.2 GiB"
    )


def test_what_is_unknown_is_left_out_and_what_was_known_stays(progress: Progress) -> None:
    progress.log(10, {"train/loss": 2.0})
    assert progress.line() == "step 10/200  epoch 0.2  loss 2.000"
    progress.log(20, {"val/AP": 0.0})
    assert progress.line() == "step 20/200  epoch 0.5  loss 2.000  AP 0.000"


def test_time_left_follows_the_speed_smoothly_and_ends(progress: Progress) -> None:
    progress.log(100, {"perf/step_s": 1.0})
    assert "ETA 1:40" in progress.line()
    progress.log(110, {"perf/step_s": 11.0})
    assert "ETA 6:00" in progress.line()  # 90 steps of 0.7 * 1 + 0.3 * 11 seconds
    progress.log(200, {"perf/step_s": 1.0})
    assert "ETA" not in progress.line()


def test_plain_lines_come_now_and_then(
    progress: Progress, stream: io.StringIO, clock: Clock
) -> None:
    for step in range(10, 60, 10):
        progress.log(step, {"train/loss": 1.0})
    assert stream.getvalue() == "step 10/200  epoch 0.2  loss 1.000\n"
    clock.now += PLAIN_INTERVAL_S + 0.1
    progress.log(60, {})
    assert stream.getvalue().splitlines()[1:] == ["step 60/200  epoch 1.5  loss 1.000"]


def test_evaluations_and_the_last_step_are_always_printed(
    progress: Progress, stream: io.StringIO, clock: Clock
) -> None:
    progress.log(10, {"train/loss": 1.0})
    progress.log(20, {"val/AP": 0.5})
    progress.log(190, {"train/loss": 1.0})
    progress.log(200, {"train/loss": 1.0})
    steps = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert steps == ["10/200", "20/200", "200/200"]


def test_plain_lines_are_neither_wrapped_nor_coloured(
    progress: Progress, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress.log(50, EVERYTHING)
    progress.say("x" * 300 + " [bold]as it is[/bold]")
    first, second = stream.getvalue().splitlines()
    assert first == progress.line()
    assert second == "x" * 300 + " [bold]as it is[/bold]"
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.9, "0:59"),
        (61, "1:01"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (86399, "23:59:59"),
        (90000, "1d01h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_table_shows_every_value_whole(stream: io.StringIO) -> None:
    print_table("preflight", [("data", "a/" * 150), ("note", "[red]no markup[/red]")], stream)
    text = stream.getvalue()
    assert text.startswith("preflight")
    assert text.count("/") == 151
    assert "[red]no markup[/red]" in text
