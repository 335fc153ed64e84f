"""A training job from command line to final table: resolve, check, record, run, report."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.cli import Options
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError, DivergedError, GaveUpError, StorageError, UserError
from orchestrator.launch import local, preflight
from orchestrator.launch.bookkeeping import Bookkeeper, dataset_facts
from orchestrator.launch.interruptions import Interruptions
from orchestrator.launch.launchers import ROOT, Launcher, LocalLauncher, RayLauncher, check_launcher
from orchestrator.launch.progress import Progress, duration, print_table
from orchestrator.launch.resolve import Derived, ResolvedJob, derive, resolve_job
from orchestrator.launch.usage import describe_usage
from orchestrator.launch.worker import Assignment, open_store
from orchestrator.records.run import DIVERGED, FINISHED, TrackedRun
from orchestrator.records.runs import Runs
from orchestrator.records.secrets import without_secret
from orchestrator.records.tracker import tracking_uri
from orchestrator.storage.checkpoints import CheckpointStore
from orchestrator.storage.filesystems import check_writable, open_place
from orchestrator.storage.retry import retrying

REPORT_PATIENCE_S = 60.0
IN_TRAINING_MODE = "workflowType=machine_learning"  # else MLflow's pages open in that for agents


@dataclass(frozen=True)
class Outcome:
    """How a job ended. code: 0 finished, 1 failed, 130 interrupted."""

    code: int
    report: dict[str, Any]


def run_train_job(job: TrainJob, options: Options, out: TextIO | None = None) -> Outcome:
    """Train as asked.

    Raises:
        UserError: found before anything expensive started, or in the data meanwhile.
    """
    check_launcher(job)
    if job.launch.launcher == "local":
        use_gpu = job.launch.gpus_per_worker != 0
        if local.rank() > 0:
            return Outcome(local.follow(use_gpu=use_gpu), {})
        with local.Leader(use_gpu=use_gpu) as leader:
            return _lead(job, options, out or sys.stdout, LocalLauncher(leader))
    return _lead(job, options, out or sys.stdout, RayLauncher())


def _lead(job: TrainJob, options: Options, out: TextIO, launcher: Launcher) -> Outcome:
    """The whole job, in the one process that decides."""
    began = time.monotonic()
    resolved, train_index, val_index = resolve_job(job)
    derived = derive(resolved, len(train_index), len(val_index))
    rows = preflight.describe_model(resolved, derived)
    for split, index, name in (
        (resolved.train, train_index, "train data"),
        (resolved.val, val_index, "val data"),
    ):
        checked = preflight.check_data(split, index, job)
        rows.append(preflight.describe_data(split, index, name, checked))
    ious = preflight.anchor_ious(resolved, train_index)
    rows.append(("anchor recall", preflight.describe_anchors(ious)))
    check_writable(open_place(str(resolved.output), "run.output"), "run.output")
    runs = _open_runs(resolved, out)
    silent = runs.check(resolved.key(), resume=options.resume, required=job.tracking.required)
    known = None if options.resume == "never" else runs.unfinished(resolved.key())
    place = open_place(_checkpoints_base(resolved, runs), "checkpoint.uri")
    check_writable(place, "checkpoint.uri")
    needed = job.tracking.required and known is None
    silent = runs.check_artifacts(required=needed) or silent
    space = preflight.check_space(place, derived.cost.params, job.checkpoint)
    if space:
        rows.append(("disk", space))
    tracked = f"{without_secret(runs.uri)}, experiment {job.tracking.experiment}"
    rows.append(("tracker", silent or tracked))

    with launcher:
        hardware = preflight.choose_hardware(
            job, cpus=launcher.cpus, gpus=launcher.gpus, local=job.launch.launcher == "local"
        )
        rows.append(("hardware", launcher.describe(hardware)))
        most = max(job.launch.workers, job.launch.max_workers or 0)
        per_node = -(-min(most, int(launcher.most_workers(hardware))) // launcher.nodes)
        resolved, memory = preflight.check_memory(resolved, derived, hardware, per_node)
        rows.append(("memory", memory))
        resolved = preflight.with_loader_workers(resolved, hardware)
        if resolved.recipe.pretrained and known is None:
            preflight.fetch_backbone(resolved)
        if job.model.init and known is None:
            initial = preflight.check_initial(resolved, train_index.classes)
            rows.append(("initial weights", initial))
        rows += [("note", note) for note in resolved.notes]
        print_table(f"preflight of {resolved.name}", rows, out)
        if options.dry_run:
            return Outcome(0, _report(resolved, derived, "dry run", None, None, {}))

        with _only_one(resolved):
            run = runs.open(name=resolved.name, key=resolved.key(), resume=options.resume)
            run = replace(run, checkpoints_uri=_checkpoints_uri(resolved, run))
            facts = {
                "training": dataset_facts(resolved.train, train_index),
                "validation": dataset_facts(resolved.val, val_index),
            }
            work = Work(resolved, derived, hardware, launcher, runs, facts, ious)
            return _run_tracked(work, run, began, out)


@dataclass(frozen=True)
class Work:
    """A checked job, ready to be run."""

    resolved: ResolvedJob
    derived: Derived
    hardware: preflight.Hardware
    launcher: Launcher
    runs: Runs
    facts: dict[str, dict[str, Any]]
    anchor_ious: NDArray[np.float32]


def _run_tracked(work: Work, run: TrackedRun, began: float, out: TextIO) -> Outcome:
    resolved, derived = work.resolved, work.derived
    val = work.facts["validation"]
    assignment = Assignment(
        resolved, run, run.checkpoints_uri,
        {"name": val["name"], "digest": val["digest"]}, work.anchor_ious,
    )  # fmt: skip
    progress = Progress(
        total_steps=derived.schedule.total,
        steps_per_epoch=derived.schedule.steps_per_epoch,
        metric=resolved.job.checkpoint.metric,
        stream=out,
    )
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
    interruptions = Interruptions(progress.say, books.happened, books.usage.at_work)
    if run.continued:
        interruptions.recall(books.recalled())
        interruptions.resumed()
    status, outcome, code = "FAILED", "failed", 1
    result: dict[str, Any] = {}
    try:
        with _interruptible():
            result = work.launcher.run(assignment, work.hardware, progress, interruptions)
        diverged = result.get("diverged")
        if isinstance(diverged, DivergedError):
            outcome = DIVERGED
            progress.close()
            print(f"diverged: {diverged}", file=sys.stderr)
        elif result["stopped"]:
            status, outcome, code = "KILLED", f"stopped: {result['stopped']}", 130
        else:
            status, outcome, code = "FINISHED", FINISHED, 0
    except KeyboardInterrupt:
        status, outcome, code = "KILLED", "interrupted", 130
    except GaveUpError as error:
        outcome = str(error)
        progress.close()
        print(f"failed: {interruptions.last or error}\n{error.cause}", file=sys.stderr)
    finally:
        progress.close()
        report = _report(resolved, derived, outcome, books.run, store, result)
        report |= {"interruptions": interruptions.counts(), "last_interruption": interruptions.last}
        used = books.usage.close()
        rows = _summary(report, interruptions.describe(), used, began)
        trouble = books.finish(status, outcome, rows, done=outcome in (FINISHED, DIVERGED))
        if trouble:
            progress.say(trouble)
    report |= {"run_id": books.run.run_id, "usage": used}
    print_table(resolved.name, [*rows, _run_row(report, books.run)], out)
    if books.run.run_id is not None:
        print(_where_to_look(report, work.runs, books.run), file=out)
    return Outcome(code, report)


def _report(
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
    if report["status"] != FINISHED:
        rows.append(("go on", "run the same command again: it continues this run"))
    return rows


def _run_row(report: dict[str, Any], run: TrackedRun) -> tuple[str, str]:
    if run.run_id is None:
        return "run", f"{run.run_key}, not yet in {report['tracking_uri']}"
    return "run", f"{run.run_id} in {report['tracking_uri']}"


def _where_to_look(report: dict[str, Any], runs: Runs, run: TrackedRun) -> str:
    """Whole lines, to be copied."""
    page = f"/#/experiments/{run.experiment_id}/runs/{run.run_id}?{IN_TRAINING_MODE}"
    if not runs.uri.startswith("sqlite"):
        return f"look at it: {report['tracking_uri']}{page}"
    mlflow = Path(sys.executable).with_name("mlflow")
    shown = mlflow.relative_to(Path.cwd()) if mlflow.is_relative_to(Path.cwd()) else mlflow
    start = f"{shown} ui --backend-store-uri {runs.uri}"
    return f"look at it: {start}\n      then: http://127.0.0.1:5000{page}"


def _open_runs(resolved: ResolvedJob, out: TextIO) -> Runs:
    """Raises TrackingError: the experiment was deleted."""
    job = resolved.job
    uri = tracking_uri(job.tracking.uri, resolved.output)
    # A database has no artifact store of its own, a server has.
    artifact_root = None if uri.startswith("http") else (resolved.output / "artifacts").as_uri()
    places = [open_place(str(resolved.output / "records"), "run.output")]
    if job.checkpoint.uri is not None:
        places.append(open_place(job.checkpoint.uri, "checkpoint.uri"))
    return Runs(
        uri, job.tracking.experiment, artifact_root, places, say=lambda text: print(text, file=out)
    )


def _checkpoints_base(resolved: ResolvedJob, runs: Runs) -> str:
    """Beside the runs' artifacts where this process can write there, so that MLflow shows them."""
    if resolved.job.checkpoint.uri is not None:
        return resolved.job.checkpoint.uri
    location = runs.artifact_location()
    if not location or location.startswith("mlflow-artifacts:"):  # behind the server's proxy
        return str(resolved.output / "checkpoints")
    return location


def _checkpoints_uri(resolved: ResolvedJob, run: TrackedRun) -> str:
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
def _only_one(resolved: ResolvedJob) -> Iterator[None]:
    """Two processes must not continue the same run. The lock goes with the process, even killed."""
    path = resolved.output / "locks" / f"{resolved.key()}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                "run.name", "a run that is not active", f"{resolved.name!r}, run by process {file.read().strip()}",
                "wait for it, stop it, or give another --name",
            ) from None  # fmt: skip
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM (what a job stop sends) ends the driver as Ctrl-C does: the run is closed properly."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["Outcome", "UserError", "run_train_job"]
