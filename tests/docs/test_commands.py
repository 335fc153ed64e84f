"""Every command of README, docs and k8s/README.md is understood by the program that it starts."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT

from .documents import BLOCK, PAGES, Command, commands, parse_only, shell_lines, stand_in

JOBS = [command for command in commands() if command.script is not None]
OTHERS = [command for command in commands() if command.script is None]


def makes(command: Command) -> None:
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.ready", *command.words[1:]],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def parses_ray(command: Command) -> None:
    """By Ray's own parser of its command line."""
    from ray.scripts.scripts import cli

    group, arguments = cli, command.words[1:]
    while hasattr(group, "commands"):
        group, arguments = group.commands[arguments[0]], arguments[1:]
    group.make_context(command.words[1], arguments)


def parses_mlflow(command: Command) -> None:
    from mlflow.models.cli import commands as models

    words = command.words
    serve = models.commands["serve"]
    serve.make_context("serve", words[words.index("serve") + 1 :])


def names_files(command: Command) -> None:
    """Folders and files of ours that it is given exist; the rest needs a cluster or a network."""
    for path in re.findall(r"(?<![\w/.:])k8s/[\w/.-]+", command.text):
        assert (ROOT / path).exists(), path


def sets_variables(command: Command) -> None:
    known = {
        "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL",
        "AWS_REQUEST_CHECKSUM_CALCULATION",
    }  # fmt: skip
    names = re.findall(r"(?<=\s)([A-Z_]+)=", command.text)
    assert names
    assert set(names) <= known


# What starts no job of ours: how far it is tried here, and why no further.
TRIED: list[tuple[str, Callable[[Command], None], str]] = [
    (r"make (train|test|sweep|docs)\b", makes, "they are what tests, the site's test and the sweeps' run"),
    (r"ray start ", parses_ray, "test_run_commands starts a head of its own, beside other clusters"),
    (r"(MLFLOW_TRACKING_URI=\S+ )?\.venv/bin/mlflow models serve ", parses_mlflow, "run by test_run_commands"),
    (r"curl -s ", names_files, "run by test_run_commands, against the server above it"),
    (r"export (RAY|AWS|MLFLOW)_", sets_variables, "settings of the reader's own cluster"),
    (r"(kind|helm|docker|kubectl) |AWS_ACCESS_KEY_ID=\S+ .* bash k8s/secrets/", names_files,
     "needs Docker and a Kubernetes cluster; tests/k8s checks what they apply"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in(tmp_path_factory.mktemp("clone") / "here")


def test_there_are_commands() -> None:
    """The pages are read as they are written: a block that is not found would test nothing."""
    assert len(JOBS) > 50
    assert {command.page for command in JOBS} >= {
        "README.md", "docs/own-dataset.md", "docs/cluster.md", "docs/models.md", "docs/resume.md",
        "docs/sweeps.md", "docs/choosing-phi.md", "k8s/README.md",
    }  # fmt: skip


def test_no_block_is_left_out() -> None:
    for path in PAGES:
        text = path.read_text()
        assert text.count("```bash") == len(BLOCK.findall(text)), path
        assert all(list(shell_lines(block)) for block in BLOCK.findall(text)), path


def test_each_job_is_shown() -> None:
    scripts = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"bootstrap"}
    assert scripts == {command.script for command in JOBS}


@pytest.mark.parametrize("command", JOBS, ids=str)
def test_a_job_understands(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert command.script is not None
    parsed = parse_only(command.script, command.arguments, monkeypatch)
    assert len(parsed) == 2


@pytest.mark.parametrize("command", [c for c in JOBS if c.words[:1] == ["ray"]], ids=str)
def test_ray_understands_what_stands_before_the_job(command: Command) -> None:
    parses_ray(command)


@pytest.mark.parametrize("command", OTHERS, ids=str)
def test_another_command_is_known(command: Command) -> None:
    matching = [row for row in TRIED if re.match(row[0], command.text)]
    assert len(matching) == 1, f"{command}: add how it is tried to TRIED"
    matching[0][1](command)


def test_each_row_is_used() -> None:
    for pattern, _, why in TRIED:
        assert any(re.match(pattern, command.text) for command in OTHERS), (pattern, why)


def test_what_no_job_understands_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.errors import ConfigError

    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="a known flag"):
        parse_only("train", ["--phy", "0"], monkeypatch)


def test_lines_are_taken_apart_as_a_shell_does() -> None:
    block = "a b   # c\n\n# d\ne \\\n  f\ng '# h\ni' j\n"
    assert list(shell_lines(block)) == ["a b", "e    f", "g '# h\ni' j"]
