"""A sweep from YAML to verdict: check, find room, let Ray Tune run the trials, answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from model.data.index import CocoIndex
from orchestrator.config.schema import TrainJob
from orchestrator.config.sweep_cli import SweepOptions, SweepRequest
from orchestrator.errors import ClusterError, ConfigError
from orchestrator.launch import preflight, ray_runtime
from orchestrator.launch.bookkeeping import dataset_facts
from orchestrator.launch.launchers import ROOT
from orchestrator.launch.places import check_places, checkpoints_base, only_one
from orchestrator.launch.preflight import Hardware
from orchestrator.launch.progress import Row, duration, print_table
from orchestrator.launch.ray_runtime import Cluster
from orchestrator.launch.resolve import Derived, ResolvedJob, derive, resolve_job
from orchestrator.launch.tracked import Outcome, where_to_look
from orchestrator.records.runs import Runs
from orchestrator.records.secrets import without_secret
from orchestrator.search import answers
from orchestrator.search.chronicle import Chronicle
from orchestrator.search.config import SweepConfig, check_objectives, decode_sweep
from orchestrator.search.constraints import Budget, Sieve
from orchestrator.search.continuing import (
    STATE,
    carried_place,
    has_ended,
    open_run,
    settled,
    sweep_key,
)
from orchestrator.search.display import Display
from orchestrator.search.ledger import Entry, Ledger, write_settings
from orchestrator.search.outlook import first_samples, outlook
from orchestrator.search.proposals import proposals
from orchestrator.search.retention import Retention
from orchestrator.search.schedulers import make_scheduler, recall
from orchestrator.search.supply import Supply, known_arms
from orchestrator.search.training import Errand
from orchestrator.search.tuning import measured_latency, new_board, run_trials
from orchestrator.storage.filesystems import open_place


@dataclass(frozen=True)
class Bench:
    """A sweep on its data, and where it keeps what it does.

    folder: of its state, here. storage: of Ray's own notes, for all nodes.
    """

    sweep: SweepConfig
    resolved: ResolvedJob
    train: CocoIndex
    val: CocoIndex
    shape: Derived
    folder: Path
    storage: str
    out: TextIO

    @property
    def longest(self) -> float:
        """What a trial that is not stopped trains, in the scheduler's unit."""
        schedule = self.shape.schedule
        epochs = schedule.total / schedule.steps_per_epoch
        total = epochs if self.sweep.scheduler.unit == "epoch" else schedule.total
        return self.sweep.longest() or total


def run_sweep_job(
    request: SweepRequest, options: SweepOptions, out: TextIO | None = None
) -> Outcome:
    """Search as asked.

    Raises:
        UserError: found before a trial took anything, or no evaluation has the objective.
    """
    began = time.monotonic()
    sweep = decode_sweep(request.mapping, folder=request.folder, name=request.name)
    resolved, train, val = resolve_job(_base_job(sweep))
    check_objectives(sweep, train.classes.names)
    folder = resolved.output / STATE / sweep.name
    with only_one(resolved.output, sweep_key(sweep.name), sweep.name):
        base = replace(sweep.base, model=resolved.job.model)  # a published name says which
        sweep = settled(replace(sweep, base=base), options, folder)
        shape = derive(resolved, len(train), len(val))
        bench = Bench(sweep, resolved, train, val, shape, folder, "", out or sys.stdout)
        if has_ended(folder) and options.extend is None and not options.dry_run:
            return _tell_again(bench)
        return _search(bench, options, began)


def _tell_again(bench: Bench) -> Outcome:
    """Of a sweep that has ended; a command that is repeated, as a cluster does, is no mistake."""
    sweep = bench.sweep
    ledger = Ledger(bench.folder, sweep.objective, workers=sweep.trials.workers_per_trial)
    ledger.close()
    found = _found(bench, ledger, [])
    answers.show(found, bench.out)
    rows = [
        ("ended before", "--extend N adds trials, --name NAME begins another sweep"),
        ("files", str(bench.folder)),
    ]
    print_table(f"sweep {sweep.name}", rows, bench.out)
    report = {"status": "ended before", "name": sweep.name, "trials": len(ledger.entries),
              "winner": found.won, "folder": str(bench.folder)}  # fmt: skip
    return Outcome(0 if found.won is not None else 1, report)


def _found(bench: Bench, ledger: Ledger, notes: Sequence[str]) -> answers.Answers:
    place = 0 if bench.sweep.scheduler.unit == "epoch" else 1
    curves = {
        entry.trial_id: [(point[place], point[2]) for point in entry.curve]
        for entry in ledger.entries.values()
    }
    return answers.answer(bench.sweep, ledger.records(), curves, bench.longest, notes)


def _search(bench: Bench, options: SweepOptions, began: float) -> Outcome:
    sweep, resolved, out = bench.sweep, bench.resolved, bench.out
    rows = preflight.check_splits(resolved, bench.train, bench.val)
    places = check_places(
        resolved, sweep_key(sweep.name), "auto", bench.shape.cost.params, out
    )  # fmt: skip
    rows += places.rows
    if resolved.recipe.pretrained:
        preflight.fetch_backbone(resolved)
    if resolved.job.model.init:
        rows.append(("initial weights", preflight.check_initial(resolved, bench.train.classes)))
    cluster = ray_runtime.connect(ROOT, dashboard=_nested(sweep))
    try:
        hardware = preflight.choose_hardware(
            resolved.job, cpus=cluster.cpus, gpus=cluster.gpus, local=False
        )
        bench = replace(bench, storage=_ray_storage(resolved, places.runs, cluster))
        room = cluster.room(hardware.cpus_per_worker, hardware.gpus_per_worker)
        concurrent = concurrency(sweep, room)
        if sweep.scheduler.kind == "pbt":
            concurrent = _population_at_once(sweep, concurrent)
        budget = Budget(
            sweep.constraints, bench.train.classes.num_classes,
            latency=measured_latency(hardware), half_precision=hardware.gpus_per_worker > 0,
        )  # fmt: skip
        ledger = Ledger(
            bench.folder, sweep.objective, workers=sweep.trials.workers_per_trial,
            carry_to=carried_place(sweep.base, sweep.name), say=lambda text: print(text, file=out),
        )  # fmt: skip
        with closing(ledger):
            known = known_arms(ledger, sweep.objectives)
            sieve = Sieve(sweep.base, budget, done=[one.arm for one in known])
            source = proposals(sweep, sieve, known)
            rows += outlook(sweep, sieve, bench.shape, bench.longest, known)
            rows.append(
                ("trials at once", f"{concurrent}, each {sweep.trials.workers_per_trial} x "
                 f"{hardware.device_kind}; {cluster.nodes} node(s), {cluster.cpus:g} CPUs, "
                 f"{cluster.gpus:g} GPUs")
            )  # fmt: skip
            rows += [("note", note) for note in [*resolved.notes, *sweep.notes()]]
            if options.dry_run:
                rows += first_samples(sweep, source)
            print_table(f"preflight of the sweep {sweep.name}", rows, out)
            if options.dry_run:
                return Outcome(0, {"status": "dry run", "name": sweep.name})
            write_settings(bench.folder, sweep.to_mapping())
            supply = Supply(
                source, ledger, budget, sweep.base, sweep.objectives,
                concurrent=concurrent, seeds=sweep.trials.seeds,
            )  # fmt: skip
            return _train(bench, places.runs, supply, sieve, hardware, began)
    finally:
        ray_runtime.disconnect()


def _train(
    bench: Bench, runs: Runs, supply: Supply, sieve: Sieve, hardware: Hardware, began: float
) -> Outcome:
    sweep, resolved, ledger = bench.sweep, bench.resolved, supply.ledger
    total = None if sweep.trials.num is None else sweep.trials.num * sweep.trials.seeds
    knobs = [d.path for d in sweep.space.dimensions if d.domain.size != 1]
    display = Display(ledger, sweep.objective, knobs, total, bench.out)
    run = open_run(runs, sweep.name, bench.folder, carried_place(sweep.base, sweep.name))
    home = open_place(str(bench.folder), "run.output")
    chronicle = Chronicle(runs, run, resolved.output, home, say=display.say)
    chronicle.begin(sweep.name, sweep.to_mapping(), sieve.describe())
    retention = Retention(
        ledger, sweep.keep, resolved.job.checkpoint, resolved.output, run, say=display.say
    )

    def tell(what: str, entry: Entry) -> None:
        display.tell(what, entry)
        if what == "ended":
            retention.look()
            chronicle.progress(ledger.ended, ledger.best)

    supply.tell = tell
    scheduler = make_scheduler(sweep)
    recall(scheduler, ledger.entries.values(), sweep)
    errand = Errand(
        sweep=sweep.name, resolved=resolved, num_train=len(bench.train), num_val=len(bench.val),
        facts={
            "training": dataset_facts(resolved.train, bench.train),
            "validation": dataset_facts(resolved.val, bench.val),
        },
        hardware=hardware, unit=sweep.scheduler.unit, longest=sweep.longest(),
        stopper=sweep.scheduler.kind, parent_id=run.run_id, board=new_board(),
        logs=bench.folder / "logs", storage=bench.storage,
    )  # fmt: skip
    try:
        interrupted = run_trials(
            sweep,
            supply,
            scheduler,
            errand,
            nested=_nested(sweep),
            say=display.say,
            storage=bench.storage
            if sweep.scheduler.kind == "pbt"
            else str(resolved.output / "ray"),
        )
    finally:
        display.close()
        retention.look()
        retention.close()
    if supply.error is not None:
        chronicle.finish("FAILED", str(supply.error), str(supply.error), [], done=False)
        raise supply.error
    notes = [supply.note] if supply.note else []
    return _answer(bench, ledger, chronicle, notes, interrupted=interrupted, began=began)


def _answer(
    bench: Bench, ledger: Ledger, chronicle: Chronicle, notes: list[str], *,
    interrupted: bool, began: float,
) -> Outcome:  # fmt: skip
    sweep, records = bench.sweep, ledger.records()
    found = _found(bench, ledger, notes)
    files = answers.write(found, bench.folder)
    states = [record.state for record in records]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    rows: list[Row] = [
        ("trials", f"{len(records)}: {counts}"),
        ("took", duration(time.monotonic() - began)),
        ("files", str(bench.folder)),
    ]
    if found.won is not None:
        rows.append(("train it", f"python jobs/train.py --config {bench.folder / answers.WINNER}"))
    outcome = "interrupted" if interrupted else "finished"
    if interrupted:
        rows.append(("go on", "run the same command again"))
    status = "KILLED" if interrupted else "FINISHED"
    description = answers.markdown(sweep.name, found, rows)
    chronicle.finish(status, outcome, description, files, done=not interrupted)
    answers.show(found, bench.out)
    print_table(f"sweep {sweep.name} {outcome}", rows, bench.out)
    report = {
        "status": outcome, "name": sweep.name, "trials": len(records), "winner": found.won,
        "folder": str(bench.folder), "run_id": chronicle.run.run_id,
        "tracking_uri": without_secret(chronicle.run.tracking_uri), "findings": list(found.lines),
    }  # fmt: skip
    if chronicle.run.run_id is not None:
        print(where_to_look(report, chronicle.runs, chronicle.run), file=bench.out)
    code = 130 if interrupted else 0 if found.won is not None else 1
    return Outcome(code, report)


def concurrency(sweep: SweepConfig, room: int) -> int:
    """Trials at once. room: for how many workers there is room.

    Raises:
        ClusterError: what was asked for can never run.
    """
    workers = sweep.trials.workers_per_trial
    fits = room // workers
    if not fits:
        raise ClusterError(
            "trials.workers_per_trial", f"at most {room}, for which there is room", str(workers),
            "lower it, or add nodes",
        )  # fmt: skip
    asked = sweep.trials.concurrent
    if asked is not None and asked > fits:
        raise ClusterError(
            "trials.concurrent", f"at most {fits}: room for {room} workers, {workers} each",
            str(asked), "lower it, write auto, or add nodes",
        )  # fmt: skip
    most = fits if sweep.trials.num is None else min(fits, sweep.trials.num * sweep.trials.seeds)
    return asked or most


def _population_at_once(sweep: SweepConfig, concurrent: int) -> int:
    """All of them: those that have no room take turns, which groups of workers cannot.

    Raises:
        ClusterError: not all groups have room.
    """
    num = sweep.trials.num or 1
    if _nested(sweep) and concurrent < num:
        raise ClusterError(
            "trials.num", f"at most {concurrent} with pbt, for which there is room", str(num),
            "lower it, add nodes, or trials.workers_per_trial: 1, which take turns",
        )  # fmt: skip
    return num


def _ray_storage(resolved: ResolvedJob, runs: Runs, cluster: Cluster) -> str:
    """Notes of Ray Tune and Ray Train; checkpoints are not among them.

    Raises:
        ClusterError: several nodes but only a local folder.
    """
    place = open_place(checkpoints_base(resolved, runs), "checkpoint.uri")
    if place.local is None:
        return place.join("ray").uri
    if cluster.several and resolved.job.checkpoint.uri is None:
        raise ClusterError(
            "train.checkpoint.uri", "a place that all nodes can reach",
            f"the local folder {place.path}",
            "give s3://… or a shared folder: --set train.checkpoint.uri=URI",
        )  # fmt: skip
    shared = place.join("ray").path if resolved.job.checkpoint.uri is not None else None
    return shared or str(resolved.output / "ray")


def _nested(sweep: SweepConfig) -> bool:
    return sweep.trials.workers_per_trial > 1 or sweep.base.launch.max_workers is not None


def _base_job(sweep: SweepConfig) -> TrainJob:
    """What every trial has in common, once the sweep's own settings are laid on it.

    Raises:
        ConfigError: trials run on Ray.
    """
    base, trials, keep = sweep.base, sweep.trials, sweep.keep
    if base.launch.launcher != "ray":
        raise ConfigError(
            "train.launch.launcher", "ray", base.launch.launcher, "a sweep needs it: remove it"
        )
    cpus = base.launch.cpus_per_worker or 1.0
    launch = replace(
        base.launch, workers=trials.workers_per_trial, cpus_per_worker=cpus,
        threads_per_worker=base.launch.threads_per_worker or max(1, int(cpus)),
        max_failures=trials.max_failures,
    )  # fmt: skip
    metric = sweep.objective.metric if sweep.objective.mode == "max" else base.checkpoint.metric
    checkpoint = replace(
        base.checkpoint, metric=metric, keep_best=keep.best_of_trial,
        keep_latest=max(2, keep.latest_of_trial),  # one may prove damaged when it is needed
    )  # fmt: skip
    return replace(base, launch=launch, checkpoint=checkpoint)
