"""A training job from command line to final table: resolve, check, record, run, report."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TextIO

from orchestrator.config.cli import Options
from orchestrator.config.schema import TrainJob
from orchestrator.errors import UserError
from orchestrator.launch import local, preflight
from orchestrator.launch.bookkeeping import dataset_facts
from orchestrator.launch.launchers import Launcher, LocalLauncher, RayLauncher, check_launcher
from orchestrator.launch.places import check_places, checkpoints_uri, only_one
from orchestrator.launch.progress import Progress, print_table
from orchestrator.launch.resolve import derive, resolve_job
from orchestrator.launch.signals import interruptible
from orchestrator.launch.tracked import Outcome, Work, report_of, run_tracked


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
    rows += preflight.check_splits(resolved, train_index, val_index)
    ious = preflight.anchor_ious(resolved, train_index)
    rows.append(("anchor recall", preflight.describe_anchors(ious)))
    places = check_places(resolved, resolved.key(), options.resume, derived.cost.params, out)
    known, runs = places.known, places.runs
    rows += places.rows

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
            return Outcome(0, report_of(resolved, derived, "dry run", None, None, {}))

        with only_one(resolved.output, resolved.key(), resolved.name):
            run = runs.open(name=resolved.name, key=resolved.key(), resume=options.resume)
            run = replace(run, checkpoints_uri=checkpoints_uri(resolved, run))
            facts = {
                "training": dataset_facts(resolved.train, train_index),
                "validation": dataset_facts(resolved.val, val_index),
            }
            work = Work(resolved, derived, hardware, launcher, runs, facts, ious)
            progress = Progress.of(derived.schedule, job.checkpoint.metric, out)
            return run_tracked(
                work, run, progress, began=began, out=out, interruptible=interruptible
            )


__all__ = ["Outcome", "UserError", "run_train_job"]
