from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from orchestrator.records.provenance import COMMIT, IMAGE, provenance


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.invalid")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    git("init", "-q")
    for name in ("code.py", ".env", "my_secrets.yaml", "key.pem"):
        (tmp_path / name).write_text("before\n")
    git("add", "-A")
    git("commit", "-qm", "first")
    return tmp_path


def test_clean_repository(repository: Path) -> None:
    found = provenance(repository)
    assert len(found.tags["mlflow.source.git.commit"]) == 40
    assert found.tags["git.dirty"] == "false"
    assert found.diff == ""
    assert any(line.startswith("torch==") for line in found.packages.splitlines())


def test_what_is_not_committed_is_kept_but_for_private_files(repository: Path) -> None:
    for name in ("code.py", ".env", "my_secrets.yaml", "key.pem"):
        (repository / name).write_text("after\n")
    found = provenance(repository)
    assert found.tags["git.dirty"] == "true"
    assert "+after" in found.diff
    assert [line for line in found.diff.splitlines() if line.startswith("+++")] == ["+++ b/code.py"]


def test_image_without_a_repository_says_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COMMIT, "abc123")
    monkeypatch.setenv(IMAGE, "registry.example/effdet:1")
    found = provenance(tmp_path)
    assert found.tags["mlflow.source.git.commit"] == "abc123"
    assert found.tags["image"] == "registry.example/effdet:1"
