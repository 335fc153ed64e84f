"""A checked training, run and recorded: what a training job and each trial of a sweep do alike."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import DivergedError, GaveUpError, StorageError
from orchestrator.launch import preflight
from orchestrator.launch.bookkeeping import Bookkeeper
from orchestrator.launch.interruptions import Interruptions
from orchestrator.launch.launchers import ROOT, Launcher
from orchestrator.launch.progress import Progress, duration, print_table
from orchestrator.launch.resolve import Derived, ResolvedJob
from orchestrator.launch.usage import describe_usage
from orchestrator.launch.worker import Assignment, open_store
from orchestrator.records.run import DIVERGED, FINISHED, TrackedRun
from orchestrator.records.runs import Runs
from orchestrator.records.secrets import without_secret
from orchestrator.storage.checkpoints import CheckpointStore
from orchestrator.storage.retry import retrying

REPORT_PATIENCE_S = 60.0
IN_TRAINING_MODE = "workflowType=machine_learning"  # else MLflow's pages open in that for agents


@dataclass(frozen=True)
class Outcome:
    """How a job ended. code: 0 finished, 1 failed, 130 interrupted."""

    code: int
    report: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A checked job, ready to be run. tags: of its run."""

    resolved: ResolvedJob
    derived: Derived
    hardware: preflight.Hardware
    launcher: Launcher
    runs: Runs
    facts: dict[str, dict[str, Any]]
    anchor_ious: NDArray[np.float32]
    tags: Mapping[str, str] = field(default_factory=dict)


def run_tracked(
    work: Work,
    run: TrackedRun,
    progress: Progress,
    *,
    began: float,
    out: TextIO,
    err: TextIO | None = None,
    ended_early: Callable[[], str | None] = lambda: None,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Outcome:
    """Train, and record how it ended whatever happens.

    began: time.monotonic() of the job. ended_early: why whoever asked for a stop did so, where that
    makes the run a complete one. interruptible: around the training.

    Raises:
        UserError: found in a worker.
    """
    resolved, derived = work.resolved, work.derived
    err = err or sys.stderr
    val = work.facts["validation"]
    assignment = Assignment(
        resolved, run, run.checkpoints_uri,
        {"name": val["name"], "digest": val["digest"]}, work.anchor_ious,
    )  # fmt: skip
    store = open_store(assignment, progress.say)
    if run.continued:
        steps = store.steps()
        at = f"from step {steps[-1]}" if steps else "from its start, it has no checkpoint"
        progress.step = steps[-1] if steps else 0
        progress.say(
            f"continuing unfinished run {run.run_id or run.run_key} {at} (--fresh starts a new one)"
        )
    books = Bookkeeper(
        work.runs, run, resolved, step=lambda: progress.step, say=progress.say,
        gpus_per_worker=work.hardware.gpus_per_worker,
    )  # fmt: skip
    books.begin(ROOT, derived, work.facts)
    if work.tags:
        books.journal.tags(work.tags)
    interruptions = Interruptions(progress.say, books.happened, books.usage.at_work)
    if run.continued:
        interruptions.recall(books.recalled())
        interruptions.resumed()
    status, outcome, code, complete = "FAILED", "failed", 1, False
    result: dict[str, Any] = {}
    try:
        with interruptible():
            result = work.launcher.run(assignment, work.hardware, progress, interruptions)
        diverged = result.get("diverged")
        if isinstance(diverged, DivergedError):
            outcome = DIVERGED
            progress.close()
            print(f"diverged: {diverged}", file=err)
        elif result["stopped"] and (early := ended_early()):
            status, outcome, code, complete = "FINISHED", early, 0, True
        elif result["stopped"]:
            status, outcome, code = "KILLED", f"stopped: {result['stopped']}", 130
        else:
            status, outcome, code = "FINISHED", FINISHED, 0
    except KeyboardInterrupt:
        status, outcome, code = "KILLED", "interrupted", 130
    except GaveUpError as error:
        outcome = str(error)
        progress.close()
        print(f"failed: {interruptions.last or error}\n{error.cause}", file=err)
    finally:
        progress.close()
        report = report_of(resolved, derived, outcome, books.run, store, result)
        report |= {"interruptions": interruptions.counts(), "last_interruption": interruptions.last}
        used = books.usage.close()
        complete = complete or outcome in (FINISHED, DIVERGED)
        rows = _summary(report, interruptions.describe(), used, began)
        if not complete:
            rows.append(("go on", "run the same command again: it continues this run"))
        trouble = books.finish(status, outcome, rows, done=complete)
        if trouble:
            progress.say(trouble)
    report |= {"run_id": books.run.run_id, "usage": used}
    print_table(resolved.name, [*rows, _run_row(report, books.run)], out)
    if books.run.run_id is not None:
        print(where_to_look(report, work.runs, books.run), file=out)
    return Outcome(code, report)


def report_of(
    resolved: ResolvedJob,
    derived: Derived,
    status: str,
    run: TrackedRun | None,
    store: CheckpointStore | None,
    result: dict[str, Any],
) -> dict[str, Any]:
    """What `--json` prints."""
    steps: list[int] = []
    best: int | None = None
    if store is not None:
        with suppress(StorageError):  # what was trained is trained; it says where it lies above
            steps = retrying(store.steps, store.place.uri, retry_for_s=REPORT_PATIENCE_S)
            best = retrying(store.best, store.place.uri, retry_for_s=REPORT_PATIENCE_S)
    return {
        "status": status,
        "run_id": run.run_id if run else None,
        "tracking_uri": without_secret(run.tracking_uri) if run else None,
        "checkpoint": store.uri(steps[-1]) if store and steps else None,
        "best_checkpoint": store.uri(best) if store and best is not None else None,
        "step": result.get("step", steps[-1] if steps else 0),
        "metrics": result.get("metrics", {}),
        "img_per_s": result.get("img_per_s"),
        "train_s": result.get("seconds"),
        "damaged_images": result.get("damaged_images"),
        "rolled_back": result.get("rolled_back"),
        "peak_memory_gib": round(result.get("peak_memory_bytes", 0) / 2**30, 3) or None,
        "params": derived.cost.params,
        "gmacs": round(derived.cost.gmacs, 4),
        "resolved": resolved.config(),
    }


def _summary(
    report: dict[str, Any], interrupted: str | None, used: dict[str, float], began: float
) -> list[tuple[str, str]]:
    metrics = report["metrics"]
    scores = [
        f"{key.removeprefix('val/')} {metrics[key]:.3f}"
        for key in ("val/AP", "val/AP50", "val/AP75", "val/APs", "val/APm", "val/APl")
        if key in metrics
    ]
    took = duration(time.monotonic() - began)
    rows = [("status", f"{report['status']} at step {report['step']}, {took} in all")]
    if scores:
        rows.append(("validation", "  ".join(scores)))
    if report["img_per_s"]:
        memory = report["peak_memory_gib"]
        rows.append(("speed", f"{report['img_per_s']:.1f} images/s, peak memory {memory:.1f} GiB"))
    if report["damaged_images"]:
        rows.append(("damaged images", f"{report['damaged_images']} met and replaced"))
    if report["rolled_back"]:
        rows.append(("rolled back", "the loss was not finite once; trained on at half the rate"))
    if interrupted:
        rows.append(("interrupted", interrupted))
    rows.append(("used", describe_usage(used)))
    for name in ("checkpoint", "best_checkpoint"):
        if report[name]:
            rows.append((name.replace("_", " "), str(report[name])))
    return rows


def _run_row(report: dict[str, Any], run: TrackedRun) -> tuple[str, str]:
    if run.run_id is None:
        return "run", f"{run.run_key}, not yet in {report['tracking_uri']}"
    return "run", f"{run.run_id} in {report['tracking_uri']}"


def where_to_look(report: dict[str, Any], runs: Runs, run: TrackedRun) -> str:
    """Whole lines, to be copied."""
    page = f"/#/experiments/{run.experiment_id}/runs/{run.run_id}?{IN_TRAINING_MODE}"
    if not runs.uri.startswith("sqlite"):
        return f"look at it: {report['tracking_uri']}{page}"
    mlflow = Path(sys.executable).with_name("mlflow")
    shown = mlflow.relative_to(Path.cwd()) if mlflow.is_relative_to(Path.cwd()) else mlflow
    start = f"{shown} ui --backend-store-uri {runs.uri}"
    return f"look at it: {start}\n      then: http://127.0.0.1:5000{page}"
