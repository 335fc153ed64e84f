from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.records.spool import Spool


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records" / "rank0.jsonl"


def record(step: int) -> dict[str, Any]:
    return {"op": "metrics", "step": step, "metrics": {"train/loss": step / 10}}


def test_records_are_read_back_in_parts(path: Path) -> None:
    spool = Spool(path)
    for step in range(5):
        spool.append(record(step))
    first, position = spool.read(0, limit=3)
    rest, end = spool.read(position, limit=3)
    assert first + rest == [record(step) for step in range(5)]
    assert spool.read(end, limit=3) == ([], end)


def test_position_survives(path: Path) -> None:
    spool = Spool(path)
    assert spool.position() == 0
    spool.append(record(1))
    spool.set_position(17)
    spool.close()
    assert Spool(path).position() == 17


@pytest.mark.parametrize("text", ["", "1x"])
def test_damaged_position_means_from_the_start(path: Path, text: str) -> None:
    Spool(path).position_path.write_text(text)
    assert Spool(path).position() == 0


def test_line_torn_by_a_kill_is_skipped_and_the_next_is_whole(path: Path) -> None:
    spool = Spool(path)
    for step in (1, 2, 3):
        spool.append(record(step))
    spool.close()
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 9)
    again = Spool(path)
    again.append(record(4))
    records, _ = again.read(0, limit=9)
    assert records == [record(1), record(2), record(4)]


def test_line_still_being_written_is_not_read(path: Path) -> None:
    spool = Spool(path)
    spool.append(record(1))
    _, whole = spool.read(0, limit=9)
    with path.open("a") as file:
        file.write('{"step": 2, "metr')
    assert spool.read(whole, limit=9) == ([], whole)


def test_rest_is_what_was_not_sent_and_another_spool_takes_it_over(
    path: Path, tmp_path: Path
) -> None:
    spool = Spool(path)
    for step in (1, 2, 3):
        spool.append(record(step))
    _, position = spool.read(0, limit=1)
    spool.set_position(position)
    other = Spool(tmp_path / "another.jsonl")
    other.append(record(9))
    other.adopt(spool.rest())
    assert other.read(0, limit=9)[0] == [record(9), record(2), record(3)]


def test_nobody_else_may_read_it(path: Path) -> None:
    Spool(path)
    assert path.stat().st_mode & 0o077 == 0


def test_closed_spool_refuses(path: Path) -> None:
    spool = Spool(path)
    spool.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        spool.append(record(1))


@pytest.mark.parametrize(
    "value",
    [
        math.inf,
        -math.inf,
        0.1,
        1e-308,
        -0.0,
        2**70,
        None,
        "null",
        "\ud800",
        np.float64(0.3),
        {1: "a"},
    ],
    ids=repr,
)
def test_what_json_can_write_down_is_read_back(path: Path, value: object) -> None:
    spool = Spool(path)
    spool.append({"op": "metrics", "value": value})
    (found,), _ = spool.read(0, limit=2)
    assert found == json.loads(json.dumps({"op": "metrics", "value": value}))


def test_a_number_that_is_none(path: Path) -> None:
    spool = Spool(path)
    spool.append(record(1) | {"metrics": {"train/loss": math.nan, "lr": 0.5}})
    (found,), _ = spool.read(0, limit=2)
    assert math.isnan(found["metrics"]["train/loss"])
    assert found["metrics"]["lr"] == 0.5
