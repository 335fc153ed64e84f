"""A training job from command line to final table: resolve, check, record, run, report."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from orchestrator.config.cli import Options
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError, DivergedError, GaveUpError, StorageError, UserError
from orchestrator.launch import local, preflight
from orchestrator.launch.interruptions import Interruptions
from orchestrator.launch.launchers import ROOT, Launcher, LocalLauncher, RayLauncher, check_launcher
from orchestrator.launch.progress import Progress, duration, print_table
from orchestrator.launch.resolve import Derived, ResolvedJob, derive, resolve_job
from orchestrator.launch.worker import Assignment, open_store
from orchestrator.records.provenance import provenance
from orchestrator.records.tracker import CHECKPOINTS, TrackedRun, Tracker, without_secret
from orchestrator.storage.checkpoints import CheckpointStore
from orchestrator.storage.filesystems import check_writable, open_place
from orchestrator.storage.retry import retrying

REPORT_PATIENCE_S = 60.0


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
    recall = preflight.anchor_recall(resolved, train_index)
    rows.append(
        ("anchor recall", f"{recall:.1%} of training boxes overlap an anchor by half or more")
    )
    check_writable(open_place(str(resolved.output), "run.output"), "run.output")
    if job.checkpoint.uri is not None:
        check_writable(open_place(job.checkpoint.uri, "checkpoint.uri"), "checkpoint.uri")
    uri = job.tracking.uri or f"sqlite:///{resolved.output / 'mlflow.db'}"
    tracker = Tracker(uri, job.tracking.experiment, resolved.output / "artifacts")
    checkpoints = job.checkpoint.uri or tracker.artifact_location()
    if checkpoints.startswith("mlflow-artifacts:"):
        checkpoints = str(resolved.output)
    space = preflight.check_space(
        open_place(checkpoints, "checkpoint.uri"), derived.cost.params, job.checkpoint
    )
    if space:
        rows.append(("disk", space))
    rows.append(("tracker", f"{without_secret(uri)}, experiment {job.tracking.experiment}"))

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
        continues = options.resume != "never" and tracker.find_unfinished(resolved.key())
        if resolved.recipe.pretrained and not continues:
            preflight.fetch_backbone(resolved)
        if job.model.init and not continues:
            initial = preflight.check_initial(resolved, train_index.classes)
            rows.append(("initial weights", initial))
        rows += [("note", note) for note in resolved.notes]
        print_table(f"preflight of {resolved.name}", rows, out)
        if options.dry_run:
            return Outcome(0, _report(resolved, derived, "dry run", None, None, {}))

        with _only_one(resolved):
            run = tracker.open_run(name=resolved.name, key=resolved.key(), resume=options.resume)
            return _run_tracked(resolved, derived, hardware, launcher, tracker, run, began, out)


def _run_tracked(
    resolved: ResolvedJob,
    derived: Derived,
    hardware: preflight.Hardware,
    launcher: Launcher,
    tracker: Tracker,
    run: TrackedRun,
    began: float,
    out: TextIO,
) -> Outcome:
    assignment = Assignment(resolved, run, _checkpoints_uri(resolved, run))
    tags = provenance(ROOT) | {CHECKPOINTS: assignment.checkpoints_uri}
    tracker.describe(run.run_id, preflight.as_params(resolved, derived), tags)
    tracker.log_dict(run.run_id, resolved.config(), "config.yaml")
    progress = Progress(
        total_steps=derived.schedule.total,
        steps_per_epoch=derived.schedule.steps_per_epoch,
        metric=resolved.job.checkpoint.metric,
        stream=out,
    )
    store = open_store(assignment, progress.say)
    check_writable(store.place, "checkpoint.uri")
    if run.continued:
        steps = store.steps()
        at = f"from step {steps[-1]}" if steps else "from its start, it has no checkpoint"
        progress.say(f"continuing unfinished run {run.run_id} {at} (--fresh starts a new one)")
    interruptions = Interruptions(progress.say, partial(tracker.tag, run.run_id))
    if run.continued:
        interruptions.recall(tracker.tags(run.run_id))
        interruptions.resumed()
    status, outcome, code = "FAILED", "failed", 1
    result: dict[str, Any] = {}
    try:
        with _interruptible():
            result = launcher.run(assignment, hardware, progress, interruptions)
        diverged = result.get("diverged")
        if isinstance(diverged, DivergedError):
            outcome = "diverged"
            progress.close()
            print(f"diverged: {diverged}", file=sys.stderr)
        elif result["stopped"]:
            status, outcome, code = "KILLED", f"stopped: {result['stopped']}", 130
        else:
            status, outcome, code = "FINISHED", "finished", 0
    except KeyboardInterrupt:
        status, outcome, code = "KILLED", "interrupted", 130
    except GaveUpError as error:
        outcome = str(error)
        progress.close()
        print(f"failed: {interruptions.last or error}\n{error.cause}", file=sys.stderr)
    finally:
        progress.close()
        trouble = tracker.end(run.run_id, status=status, outcome=outcome)
        if trouble:
            progress.say(f"the tracker could not be told that the run {outcome} ({trouble})")
    report = _report(resolved, derived, outcome, run, store, result)
    report |= {"interruptions": interruptions.counts(), "last_interruption": interruptions.last}
    _print_summary(resolved, report, interruptions.describe(), tracker, began, out)
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


def _print_summary(
    resolved: ResolvedJob,
    report: dict[str, Any],
    interrupted: str | None,
    tracker: Tracker,
    began: float,
    out: TextIO,
) -> None:
    metrics = report["metrics"]
    scores = [
        f"{key.removeprefix('val/')} {metrics[key]:.3f}"
        for key in ("val/AP", "val/AP50", "val/AP75", "val/APs", "val/APm", "val/APl")
        if key in metrics
    ]
    rows = [
        (
            "status",
            f"{report['status']} at step {report['step']}, {duration(time.monotonic() - began)} in all",
        )
    ]
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
    for name in ("checkpoint", "best_checkpoint"):
        if report[name]:
            rows.append((name.replace("_", " "), str(report[name])))
    rows.append(("run", f"{report['run_id']} in {report['tracking_uri']}"))
    if report["status"] != "finished":
        rows.append(("go on", "run the same command again: it continues this run"))
    if tracker.uri.startswith("sqlite"):
        mlflow = Path(sys.executable).with_name("mlflow")
        shown = mlflow.relative_to(Path.cwd()) if mlflow.is_relative_to(Path.cwd()) else mlflow
        rows.append(
            (
                "look at it",
                f"{shown} ui --backend-store-uri {tracker.uri}  then http://127.0.0.1:5000 (choose Model training)",
            )
        )
    else:
        rows.append(
            (
                "look at it",
                f"{report['tracking_uri']}/#/experiments/{tracker.experiment_id}/runs/{report['run_id']}",
            )
        )
    print_table(resolved.name, rows, out)


def _checkpoints_uri(resolved: ResolvedJob, run: TrackedRun) -> str:
    """Beside the run's artifacts where this process can write there, so that MLflow shows them."""
    if resolved.job.checkpoint.uri is not None:
        return f"{resolved.job.checkpoint.uri.rstrip('/')}/{run.run_id}"
    if run.artifact_uri.startswith("mlflow-artifacts:"):  # behind the server's proxy
        return str(resolved.output / "checkpoints" / run.run_id)
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
