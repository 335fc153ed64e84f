"""docs/sweeps.md against the program: its commands parse, its example and its tables are true."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, environment

from orchestrator.config.sweep_cli import SWEEP_FLAGS, SweepOptions, parse_tune
from orchestrator.search.answers import answer
from orchestrator.search.config import (
    KEYS,
    KeepConfig,
    SchedulerConfig,
    SearchConfig,
    SweepConfig,
    TrialsConfig,
    decode_sweep,
)
from orchestrator.search.constraints import Budget, ConstraintsConfig, Sieve, draw
from orchestrator.search.domains import KINDS
from orchestrator.search.trial import TrialRecord

PAGE = (ROOT / "docs" / "sweeps.md").read_text()
README = (ROOT / "README.md").read_text()
ON_SMALL_DATA = "train.data.root=shapes"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Words of each line of the bash blocks that runs one of our jobs, comments left out."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if "jobs/" in line]


def tunes(text: str) -> list[list[str]]:
    """Arguments of jobs/tune.py."""
    found = [words for words in commands(text) if "jobs/tune.py" in words]
    return [words[words.index("jobs/tune.py") + 1 :] for words in found]


def read(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[SweepConfig, SweepOptions]:
    monkeypatch.chdir(ROOT)
    request, options = parse_tune("", argv)
    return decode_sweep(request.mapping, folder=request.folder, name=request.name), options


def test_the_page_has_commands() -> None:
    assert len(tunes(PAGE)) >= 6
    assert any("--dry-run" in argv and ON_SMALL_DATA in argv for argv in tunes(PAGE))
    for words in commands(PAGE):
        for script in (word for word in words if word.startswith("jobs/") and word.endswith(".py")):
            assert (ROOT / script).is_file()


@pytest.mark.parametrize("argv", tunes(PAGE) + tunes(README), ids=" ".join)
def test_every_command_is_understood(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, _ = read(argv, monkeypatch)
    for given in (argv[i + 1] for i, word in enumerate(argv) if word == "--set"):
        path, _, value = given.partition("=")
        if path == "train.data.root":
            assert sweep.base.data.root == value


def test_settings_that_the_page_names_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.findall(
        r"`(?:--set )?((?:train|trials|constraints|scheduler)\.[\w.]+)=([^`]+)`", PAGE
    )
    assert len(found) >= 3
    files = {"constraints": "compound", "scheduler": "fusion_scaling", "space": "fusion"}
    for path, value in [*found, ("space.model.fusion", "{choice: [fast, sum]}")]:
        file = files.get(path.split(".")[0], "width")
        config = f"jobs/sweeps/{file}.yaml"
        read(["--config", config, "--set", f"{path}={value}"], monkeypatch)


def test_settings_that_headers_name_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0
    for path in (ROOT / "jobs" / "sweeps").glob("*.yaml"):
        header = " ".join(line[1:] for line in path.read_text().splitlines() if line[:1] == "#")
        for name, given in re.findall(r"(--name \S+ )?--set (\S+=\S+)", header):
            seen += 1
            read(["--config", str(path), *name.split(), "--set", given.rstrip(";,.")], monkeypatch)
    assert seen >= 4


def test_its_example_is_a_sweep_that_has_samples() -> None:
    [text] = blocks(PAGE, "yaml")
    sweep = decode_sweep(yaml.safe_load(text))
    budget = Budget(sweep.constraints, 80)
    found = draw(
        sweep.space, Sieve(sweep.base, budget), grid=False, seed=sweep.search.seed,
        num=sweep.trials.num, points=sweep.search.points,
    )  # fmt: skip
    assert len(found) == sweep.trials.num == 24
    assert found[0] == sweep.search.points[0]


def first_cells(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)


def test_its_table_has_every_key() -> None:
    sections: dict[str, Any] = {
        "trials": TrialsConfig, "search": SearchConfig, "scheduler": SchedulerConfig,
        "constraints": ConstraintsConfig, "keep": KeepConfig,
    }  # fmt: skip
    expected = [key for key in KEYS if key not in sections]
    for name, section in sections.items():
        expected += [f"{name}.{field.name}" for field in dataclasses.fields(section)]
    there = [cell for cell in first_cells(PAGE) if cell.split(".")[0] in KEYS]
    assert sorted(there) == sorted([*expected, "trials.json"]), "the last is a file"


def test_its_table_has_the_defaults() -> None:
    written = dict(re.findall(r"^\| `([\w.]+)` \|.*\| ([\w.]+) \|$", PAGE, flags=re.MULTILINE))
    defaults = {
        "trials.seeds": TrialsConfig().seeds, "trials.workers_per_trial": TrialsConfig().workers_per_trial,
        "trials.max_failures": TrialsConfig().max_failures, "search.algorithm": SearchConfig().algorithm,
        "search.seed": SearchConfig().seed, "scheduler.kind": SchedulerConfig().kind,
        "scheduler.unit": SchedulerConfig().unit, "scheduler.grace": SchedulerConfig().grace,
        "scheduler.reduction": SchedulerConfig().reduction,
        "keep.best_of_sweep": KeepConfig().best_of_sweep,
        "keep.best_of_trial": KeepConfig().best_of_trial,
        "keep.latest_of_trial": KeepConfig().latest_of_trial,
    }  # fmt: skip
    for key, default in defaults.items():
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        assert written[key] == shown, key


def test_its_table_has_every_domain_flag_and_scheduler() -> None:
    assert sorted(re.findall(r"^\| `\{(\w+):", PAGE, flags=re.MULTILINE)) == sorted(KINDS)
    for flag in [flag.name for flag in SWEEP_FLAGS] + ["--resume", "--extend", "--dry-run"]:
        assert flag in PAGE
    kinds = ("none", "asha", "median", "pbt")
    assert set(kinds) <= set(first_cells(PAGE))


def test_its_table_has_every_file(
    sweep: tuple[list[TrialRecord], dict[str, list[tuple[float, float]]]],
) -> None:
    records, curves = sweep
    given: dict[str, Any] = {
        "train": {"model": {"phi": "1"}}, "objective": {"metric": "val/AP"}, "trials": {"num": 48},
        "space": {"optim.lr_per_64": {"loguniform": [0.02, 0.2]}},
    }  # fmt: skip
    found = answer(decode_sweep(given), records, curves, 54.0)
    names = {*found.files, *found.figures}
    assert names == {name for name in first_cells(PAGE) if not name.startswith("{")} & names
    assert {
        cell for cell in first_cells(PAGE) if cell.endswith((".png", ".csv", ".json", ".md"))
    } <= names


def test_its_table_has_every_shipped_sweep() -> None:
    shipped = {path.name for path in (ROOT / "jobs" / "sweeps").glob("*.yaml")}
    assert shipped == {cell for cell in first_cells(PAGE) if cell.endswith(".yaml")} - {
        "winner.yaml"
    }


def test_make_sweep_runs_the_smoke_sweep() -> None:
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.ready", "sweep", "ARGS=--dry-run"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "jobs/tune.py --config jobs/sweeps/smoke.yaml --dry-run" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv", [a for a in tunes(PAGE) if "--dry-run" in a and ON_SMALL_DATA in a], ids=" ".join
)
def test_a_sweep_for_a_cluster_is_checked_on_a_small_machine(
    argv: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "tune.py"), *argv, "--output", str(tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none of 6 samples rejected" in done.stdout
    assert "18 trials, 3 seeds each, up to 300 epochs; grid, no early stopping" in done.stdout
    assert not list(tmp_path.glob("sweeps/*/trials.json"))
