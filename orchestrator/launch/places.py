"""Where a job's records and checkpoints go, checked before anything is trained."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError
from orchestrator.launch import preflight
from orchestrator.launch.progress import Row
from orchestrator.launch.resolve import ResolvedJob
from orchestrator.records.run import TrackedRun
from orchestrator.records.runs import Runs
from orchestrator.records.secrets import without_secret
from orchestrator.records.tracker import tracking_uri
from orchestrator.storage.filesystems import check_writable, open_place


@dataclass(frozen=True)
class Places:
    """Checked. known: the run to go on with, if there is one. rows: for the preflight's table."""

    runs: Runs
    known: TrackedRun | None
    rows: list[Row]


def check_places(resolved: ResolvedJob, key: str, resume: str, params: int, out: TextIO) -> Places:
    """key: of the run that is begun or gone on with; resume: see `Options.resume`; params: of a network.

    Raises:
        UserError: a place that does not take what a run writes, or a tracker that has to answer.
    """
    job, rows = resolved.job, list[Row]()
    check_writable(open_place(str(resolved.output), "run.output"), "run.output")
    runs = open_runs(job, resolved.output, out)
    silent = runs.check(key, resume=resume, required=job.tracking.required)
    known = None if resume == "never" else runs.unfinished(key)
    place = open_place(checkpoints_base(resolved, runs), "checkpoint.uri")
    check_writable(place, "checkpoint.uri")
    needed = job.tracking.required and known is None
    silent = runs.check_artifacts(required=needed) or silent
    space = preflight.check_space(place, params, job.checkpoint)
    if space:
        rows.append(("disk", space))
    tracked = f"{without_secret(runs.uri)}, experiment {job.tracking.experiment}"
    rows.append(("tracker", silent or tracked))
    return Places(runs, known, rows)


def open_runs(job: TrainJob, output: Path, out: TextIO) -> Runs:
    """Raises TrackingError: the experiment was deleted."""
    uri = tracking_uri(job.tracking.uri, output)
    # A database has no artifact store of its own, a server has.
    artifact_root = None if uri.startswith("http") else (output / "artifacts").as_uri()
    places = [open_place(str(output / "records"), "run.output")]
    if job.checkpoint.uri is not None:
        places.append(open_place(job.checkpoint.uri, "checkpoint.uri"))
    return Runs(
        uri, job.tracking.experiment, artifact_root, places, say=lambda text: print(text, file=out)
    )


def checkpoints_base(resolved: ResolvedJob, runs: Runs) -> str:
    """Beside the runs' artifacts where this process can write there, so that MLflow shows them."""
    if resolved.job.checkpoint.uri is not None:
        return resolved.job.checkpoint.uri
    location = runs.artifact_location()
    if not location or location.startswith("mlflow-artifacts:"):  # behind the server's proxy
        return str(resolved.output / "checkpoints")
    return location


def checkpoints_uri(resolved: ResolvedJob, run: TrackedRun) -> str:
    """Of one run; a continued one keeps its place unless the job now names another."""
    base = resolved.job.checkpoint.uri
    if run.checkpoints_uri and (base is None or run.checkpoints_uri.startswith(base)):
        return run.checkpoints_uri
    if base is not None:
        return f"{base.rstrip('/')}/{run.run_key}"
    if run.artifact_uri is None or run.artifact_uri.startswith("mlflow-artifacts:"):
        return str(resolved.output / "checkpoints" / run.run_key)
    return f"{run.artifact_uri.rstrip('/')}/checkpoints"


@contextmanager
def only_one(output: Path, key: str, name: str) -> Iterator[None]:
    """Two processes must not continue the same run. The lock goes with the process, even killed."""
    path = output / "locks" / f"{key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                "run.name", "a run that is not active", f"{name!r}, run by process {file.read().strip()}",
                "wait for it, stop it, or give another --name",
            ) from None  # fmt: skip
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
