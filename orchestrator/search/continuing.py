"""How a sweep goes on from what there is of it: on this machine, or where another one carried it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from orchestrator.config.codec import flatten
from orchestrator.config.schema import TrainJob
from orchestrator.config.sweep_cli import SweepOptions
from orchestrator.errors import ConfigError
from orchestrator.records.run import TrackedRun, read_card
from orchestrator.records.runs import Runs
from orchestrator.search.config import SweepConfig, decode_sweep
from orchestrator.search.ledger import Ledger, fetch, read_settings
from orchestrator.storage.filesystems import Place, open_place

STATE = "sweeps"
MAY_CHANGE = ("trials", "space", "constraints", "search", "keep")  # when a sweep goes on
# Of the training job: how it runs and where its records go.
OPERATIONAL = (
    "run", "tracking", "launch", "checkpoint", "data.cache", "data.check", "data.loader_workers",
    "train.log_every_steps",
)  # fmt: skip


def settled(sweep: SweepConfig, options: SweepOptions, folder: Path) -> SweepConfig:
    """The sweep as it goes on from what there is of it.

    Raises:
        ConfigError: there is none to go on with, or it is another one.
    """
    carried = carried_place(sweep.base, sweep.name)
    if carried is not None:
        fetch(folder, carried)
    settings = read_settings(folder)
    if settings is None:
        if options.resume or options.extend is not None:
            flag = "--resume" if options.resume else "--extend"
            raise ConfigError(
                flag, f"a sweep that was begun as {sweep.name!r}", f"none in {folder}",
                f"leave {flag} out, or correct --name or --output",
            )  # fmt: skip
        return sweep
    before = decode_sweep(settings, name=sweep.name)
    _check_same(before.to_mapping(), sweep.to_mapping())
    # What was asked for last, which may be more than its YAML says.
    num = before.trials.num
    if num is not None and sweep.trials.num is not None:
        num = max(num, sweep.trials.num)
    if options.extend is not None and (has_ended(folder) or options.dry_run):
        num = _arms_begun(folder, sweep) + options.extend
    return replace(sweep, trials=replace(sweep.trials, num=num))


def has_ended(folder: Path) -> bool:
    """All that was asked for is trained."""
    try:
        return read_card(open_place(str(folder), "run.output")).done
    except (FileNotFoundError, ValueError, TypeError):
        return False


def _check_same(before: dict[str, object], now: dict[str, object]) -> None:
    """What trials are compared by must not change between them."""
    for key in before:
        if key in MAY_CHANGE:
            continue
        old, new = _flat(before[key]), _flat(now[key])
        paths = [path for path in {**old, **new} if old.get(path) != new.get(path)]
        if paths:
            changes = ", ".join(f"{path} {new.get(path)} (was {old.get(path)})" for path in paths)
            raise ConfigError(
                key, "what the sweep was begun with", f"another: {changes}",
                "undo the change, or begin another sweep with --name",
            )  # fmt: skip


def _flat(section: object) -> dict[str, object]:
    """By dotted path, without what may differ."""
    if not isinstance(section, dict):
        return {"": section}
    operational = tuple(f"{path}." for path in OPERATIONAL)
    return {p: v for p, v in flatten(section).items() if not f"{p}.".startswith(operational)}


def _arms_begun(folder: Path, sweep: SweepConfig) -> int:
    ledger = Ledger(folder, sweep.objective, workers=1)
    ledger.close()
    return len({entry.begun_as for entry in ledger.entries.values()})


def open_run(runs: Runs, name: str, folder: Path, carried: Place | None) -> TrackedRun:
    """The sweep's own run: the one it was begun with, or a new one."""
    key = sweep_key(name)
    try:
        card = read_card(open_place(str(folder), "run.output"))
        run = runs.open(name=name, key=key, resume=card.run_id or "auto")
    except FileNotFoundError:
        run = runs.open(name=name, key=key, resume="never" if carried is None else "auto")
    return replace(run, checkpoints_uri=carried.uri if carried else str(folder), outcome="")


def carried_place(job: TrainJob, name: str) -> Place | None:
    """Where a sweep's state is copied, if checkpoints go beyond this machine."""
    if job.checkpoint.uri is None:
        return None
    place = open_place(job.checkpoint.uri, "checkpoint.uri")
    return None if place.local is not None else place.join(STATE).join(name)


def sweep_key(name: str) -> str:
    return hashlib.sha256(f"sweep/{name}".encode()).hexdigest()[:24]
