"""What survives of a sweep when its driver, or its machine, does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StorageError
from orchestrator.search.ledger import FILE, SWEEP, Entry, Ledger, fetch, write_settings
from orchestrator.search.trial import Objective
from orchestrator.storage.filesystems import Place, open_place

AP = Objective("val/AP")


def begin(ledger: Ledger, width: float = 1.2) -> Entry:
    return ledger.add({"model.scaling.width": width}, f"arm-{width}", 0, 1000, 0.5)


def result(step: int, ap: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "process": "p", "seconds": float(step),
            "val/AP": ap, "val_class/cat": 0.1, "checkpoints_uri": "a", **more}  # fmt: skip


def test_read_again_it_says_the_same(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, AP, workers=2)
    entry = begin(ledger)
    ledger.scored(entry.trial_id, result(10, 0.2))
    ledger.scored(entry.trial_id, result(20, 0.1))
    ledger.end(entry.trial_id, "stopped")
    begin(ledger, 1.3)
    ledger.close()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"op": "end", "trial": "001", "sta')  # killed while it wrote
    again = Ledger(tmp_path, AP, workers=2)
    assert again.entries == ledger.entries
    assert again.entries["000"].curve == [(1.0, 10, 0.2), (2.0, 20, 0.1)]
    assert again.entries["000"].best["val/AP"] == again.best == 0.2
    assert "val_class/cat" not in again.entries["000"].best
    assert [record.state for record in again.records()] == ["stopped", "interrupted"]
    assert again.records()[0].worker_hours == 20 * 2 / 3600
    again.end("001", "failed", "diverged")  # goes on behind the last whole line
    again.close()
    assert Ledger(tmp_path, AP, workers=2).entries["001"].reason == "diverged"


def test_steps_that_are_trained_again_count_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, AP, workers=1)
    entry = begin(ledger)
    for step, ap in ((10, 0.1), (20, 0.2), (20, 0.2), (30, 0.3)):
        ledger.scored(entry.trial_id, result(step, ap))
    assert [step for _, step, _ in entry.curve] == [10, 20, 30]


def test_the_best_is_of_what_ended_and_did_not_fail(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, AP, workers=1)
    for state, ap in (("finished", 0.2), ("failed", 0.9), ("stopped", 0.3), ("finished", 0.1)):
        entry = begin(ledger, ap)
        ledger.scored(entry.trial_id, result(10, ap))
        ledger.end(entry.trial_id, state)  # type: ignore[arg-type]
    assert ledger.best == 0.3


def test_checkpoints_of_earlier_generations_are_remembered(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, AP, workers=1)
    entry = begin(ledger)
    for uri in ("a", "a", "b", "c"):
        ledger.scored(entry.trial_id, result(10, 0.1, checkpoints_uri=uri))
    assert (entry.checkpoints_uri, entry.earlier_uris) == ("c", ["a", "b"])


def test_another_machine_finds_the_copy(tmp_path: Path) -> None:
    there = open_place(str(tmp_path / "there"), "checkpoint.uri")
    (tmp_path / "there").mkdir()
    write_settings(tmp_path / "one", {"name": "it"})
    ledger = Ledger(tmp_path / "one", AP, workers=1, carry_to=there)
    ledger.end(begin(ledger).trial_id, "finished")
    ledger.close()
    fetch(tmp_path / "two", there)
    assert (tmp_path / "two" / SWEEP).read_text() == (tmp_path / "one" / SWEEP).read_text()
    assert Ledger(tmp_path / "two", AP, workers=1).entries["000"].state == "finished"
    # What is here is newer than any copy.
    (tmp_path / "there" / FILE).write_text("")
    fetch(tmp_path / "two", there)
    assert (tmp_path / "two" / FILE).read_text()


def test_what_could_not_be_copied_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.search.ledger.CARRY_EVERY_S", 0.01)
    nowhere = open_place(str(tmp_path / "missing" / "folder"), "checkpoint.uri")
    said: list[str] = []
    ledger = Ledger(tmp_path / "one", AP, workers=1, carry_to=nowhere, say=said.append)
    begin(ledger)
    ledger.close()
    assert len(said) == 1
    assert "the sweep's state is not in" in said[0]


def test_a_place_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    class Away:
        def cat_file(self, path: str) -> bytes:
            raise ConnectionError("no route")

    with pytest.raises(StorageError, match=r"a place that can be read, got s3://b/it \(no route\)"):
        fetch(tmp_path, Place("s3://b/it", Away(), "b/it"))
