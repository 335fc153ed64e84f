from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.records.journal import Journal
from orchestrator.records.run import TrackedRun
from orchestrator.records.sender import Sender
from orchestrator.records.spool import Spool


def test_no_secret_is_even_written_down(
    tmp_path: Path, tracked: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    journal = Journal(Sender(tracked, Spool(tmp_path / "driver.jsonl")))
    journal.params({"data.root": "s3://user:planted-password@host/data", "n": 3})
    journal.tags({"effdet.last_interruption": "no access with planted-token"})
    journal.text("source/uncommitted.diff", '+token = "planted-token"')
    journal.describe("trained with planted-token")
    journal.dataset(
        {"name": "d", "digest": "1", "source": "https://u:planted-password@h/x", "profile": {}},
        "training",
    )
    journal.end("FAILED", "could not log in with planted-token")
    assert journal.close(30)
    written = (tmp_path / "driver.jsonl").read_text()
    assert "planted" not in written
    assert written.count("***") == 6
    records, _ = Spool(tmp_path / "driver.jsonl").read(0, 99)
    assert records[0]["params"] == {"data.root": "s3://***@host/data", "n": "3"}
