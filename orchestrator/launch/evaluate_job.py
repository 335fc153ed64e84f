"""Evaluation as a job: open the models, find the images, share them out, score, write, compare."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import torch

from model.data.dataset import DetectionDataset
from model.data.index import CocoIndex
from model.detection.views import View, plan_views
from model.network.scaling import NetworkSpec
from model.predictor import Predictor
from model.training.bootstrap import Comparison, compare
from model.training.evaluation import Evaluation, assess
from model.training.examination import Examiner, Found, Positions, in_batches, in_order
from orchestrator.config.evaluate_cli import EvaluateOptions, EvaluateRequest, SplitName
from orchestrator.config.schema import RunConfig, TrainJob
from orchestrator.errors import ConfigError, DataError, GaveUpError, StorageError
from orchestrator.launch import preflight
from orchestrator.launch.crew import Crew, threads_for
from orchestrator.launch.evaluate_report import Pace, Report, write_all
from orchestrator.launch.evaluated_model import (
    EvaluatedModel,
    Source,
    configured,
    fit_to,
    open_source,
    short_name,
)
from orchestrator.launch.fleet import work_through
from orchestrator.launch.packed_model import device_held, within_memory
from orchestrator.launch.progress import Row, print_table
from orchestrator.launch.resolve import Split, find_one_split, output_folder
from orchestrator.records.tracker import tracking_uri
from orchestrator.storage.filesystems import check_writable, is_remote, open_place, reason

EVALUATIONS = "evaluations"
BATCHES_AT_ONCE = 4  # handed to a worker, so that it can read ahead
MOST_READERS = 8


@dataclass(frozen=True)
class EvaluateOutcome:
    """code: 0, or 1 if workers died too often."""

    code: int
    report: dict[str, Any]


@dataclass(frozen=True)
class Images:
    """What is looked at. name: of the split."""

    split: Split
    index: CocoIndex
    name: SplitName


@dataclass(frozen=True)
class Plan:
    """All that is decided before a model is loaded. views: of each model."""

    models: tuple[EvaluatedModel, ...]
    views: tuple[tuple[View, ...], ...]
    images: Images
    job: TrainJob
    crew: Crew
    output: Path
    notes: tuple[str, ...]


def run_evaluate_job(
    request: EvaluateRequest, options: EvaluateOptions, out: TextIO | None = None
) -> EvaluateOutcome:
    """Score one model, or compare two.

    Raises:
        UserError: found before anything is computed, or an image that is not to be forgiven.
    """
    out = out or sys.stdout
    plan = make_plan(request)
    print_table("evaluation", describe(request, plan), out)
    began = time.monotonic()
    try:
        found = [
            look(plan, number, Pace(len(plan.images.index), model.name, out))
            for number, model in enumerate(plan.models)
        ]
    except GaveUpError as error:
        print(f"failed: {error}\n{error.cause}", file=sys.stderr, flush=True)
        return EvaluateOutcome(1, {"status": "failed", "error": str(error.cause)})
    seconds = time.monotonic() - began
    evaluations = [assess(plan.images.index, one.rows) for one in found]
    compared = _compared(request, plan.images.index, evaluations, out)
    report = Report(
        request, plan.models, plan.images.index, plan.images.name, evaluations, compared,
        damaged=found[0].damaged, img_per_s=len(plan.images.index) * len(found) / seconds,
        output=plan.output,
    )  # fmt: skip
    report.show(out)
    overlaps = preflight.anchor_overlaps(plan.models[0].spec, plan.images.index)
    try:
        write_all(report, plan.images.split.reader(), overlaps)
    except OSError as error:  # after the numbers were shown
        raise StorageError(
            "--output", "a folder that takes what is written", f"{plan.output} ({reason(error)})",
            "make room, or choose another",
        ) from None  # fmt: skip
    print_table("written", [("output", f"{plan.output}/")], out)
    return EvaluateOutcome(0, report.as_json())


def make_plan(request: EvaluateRequest) -> Plan:
    """Everything that can be wrong is found here.

    Raises:
        UserError
    """
    crew = make_crew(request)
    runs, notes = output_folder(TrainJob())
    with ExitStack() as stack:
        uri = tracking_uri(request.tracking_uri, runs)
        sources = [stack.enter_context(open_source(name, uri)) for name in request.sources]
        _check_changes(request, sources)
        jobs = [configured(source, request.changes) for source in sources]
        images, more = find_images(jobs[0], request.split)
        models = tuple(
            fit_to(source, job, images.index) for source, job in zip(sources, jobs, strict=True)
        )
        name = f"{short_name(sources[0], jobs[0])}-{images.name}"
    views = tuple(plan_views(model.spec, request.scales, flip=request.flip) for model in models)
    output, where = output_folder(
        TrainJob(run=RunConfig(output=str(request.output or runs / EVALUATIONS / name)))
    )
    check_writable(open_place(str(output), "--output"), "--output")
    said = dict.fromkeys([*notes, *more, *where])  # each once
    return Plan(models, views, images, jobs[0], crew, output, tuple(said))


def _check_changes(request: EvaluateRequest, sources: Sequence[Source]) -> None:
    if "model" in request.changes and all(source.is_checkpoint for source in sources):
        asked = ", ".join(f"model.{name}" for name in request.changes["model"])
        raise ConfigError(
            asked, "no network to be named beside a checkpoint, which knows its own",
            "one", "leave it out",
        )  # fmt: skip


def find_images(job: TrainJob, asked: SplitName | None) -> tuple[Images, list[str]]:
    """The images to look at and what to say of them.

    Raises:
        UserError: not there, or nothing to score.
    """
    name: SplitName = asked or "val"
    split, notes = find_one_split(job, name)
    if split is None and asked is None:
        name = "train"
        split, notes = find_one_split(job, name)
        notes.append("no *val*.json found: evaluating on the TRAINING images")
    if split is None:
        raise DataError(
            "data.root", f"annotations/*{name}*.json", f"none in {job.data.root}",
            f"see the README for the layouts, or --set data.{name}.annotations=PATH",
        )  # fmt: skip
    index = split.index(job.data.classes)
    if not len(index):
        raise DataError(index.name, "at least one image", "none", "add images")
    if index.crowd.all():
        got = "none" if not len(index.labels) else f"{len(index.labels)} crowds only"
        raise DataError(index.name, "at least one box to find", got, "annotate some images")
    preflight.check_data(split, index, job)
    return Images(split, index, name), notes


def make_crew(request: EvaluateRequest) -> Crew:
    """Who looks at the images.

    Raises:
        ConfigError: numbers that cannot be.
    """
    cores = threads_for(request.cpus_per_worker) if request.workers else _cores()
    threads = request.threads if request.threads is not None else cores
    return Crew(request.workers, request.cpus_per_worker, request.gpus_per_worker, threads)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class MakeExaminer:
    """Called in each worker: the model, ready to look. What it holds travels there."""

    model: EvaluatedModel
    views: tuple[View, ...]
    images: Images
    job: TrainJob
    cpu_only: bool

    def __call__(self) -> Looker:
        """Raises ConfigError where this node does not see what the driver sees."""
        folder = self.images.split.images
        if not is_remote(folder) and not folder.is_dir():  # all of them would count as empty
            raise ConfigError(
                "data.root", "images that every node reaches", f"{folder}, which one does not",
                "give s3://… or a shared folder",
            )  # fmt: skip
        device = torch.device("cpu") if self.cpu_only else device_held()
        with self.model.packed.unpacked() as folder:
            loaded = Predictor.load(folder, device, self.model.evaluation)
        data = self.job.data
        dataset = DetectionDataset(
            self.images.index, self.images.split.reader(), self.model.spec.image_size_px,
            data.augment, 0, data.damaged,
        )  # fmt: skip
        readers = min(MOST_READERS, _cores()) if device.type == "cuda" else 0
        return Looker(
            Examiner(
                loaded.detector, loaded.spec, dataset, loaded.config, self.views,
                device=loaded.device, autocast=loaded.autocast, readers=readers,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class Looker:
    examiner: Examiner

    def __call__(self, batches: Sequence[Positions]) -> Found:
        with within_memory(len(batches[0])):
            return self.examiner(batches)


def look(plan: Plan, number: int, pace: Pace) -> Found:
    """What a model finds in all images, in their order, whoever looked at which.

    Raises:
        DataError: not one of them could be read.
    """
    model = plan.models[number]
    cpu_only = plan.crew.gpus_per_worker == 0
    make = MakeExaminer(model, plan.views[number], plan.images, plan.job, cpu_only)
    batches = in_batches(len(plan.images.index), model.evaluation.batch_size)
    answers = []
    tasks = _tasks(batches, plan.crew.workers or 1)
    working = work_through(tasks, make, plan.crew, say=pace.say)
    with closing(cast("Any", working)):
        for task, answer in working:
            answers.append(answer)
            pace.add(sum(len(batch) for batch in task))
    pace.close()
    found = in_order(answers)
    if found.damaged == len(plan.images.index):
        raise DataError(
            "data.root", "images that can be read",
            f"none of {found.damaged} below {plan.images.split.images}",
            "replace them, or correct data.val.images",
        )  # fmt: skip
    return found


def _tasks(batches: Sequence[Positions], workers: int) -> Iterable[tuple[Positions, ...]]:
    """Some batches at a time, so few that every worker gets its share."""
    size = max(1, min(BATCHES_AT_ONCE, len(batches) // (2 * workers)))
    return (tuple(batches[i : i + size]) for i in range(0, len(batches), size))


def _compared(
    request: EvaluateRequest, index: CocoIndex, evaluations: Sequence[Evaluation], out: TextIO
) -> Comparison | None:
    if len(evaluations) < 2:
        return None
    print(f"comparing: {request.resamples} resamples of {len(index)} images", file=out, flush=True)
    a, b = (evaluation.rows for evaluation in evaluations)
    return compare(index, a, b, resamples=request.resamples, seed=request.seed)


def describe(request: EvaluateRequest, plan: Plan) -> list[Row]:
    rows = []
    for model, views in zip(plan.models, plan.views, strict=True):
        spec, config = model.spec, model.evaluation
        at = "" if model.step is None else f", step {model.step}"
        seen = ", ".join(f"{v.image_size_px} px{' mirrored' if v.flip else ''}" for v in views)
        sharp = f"IoU {config.iou:g}" if config.nms == "hard" else f"sigma {config.sigma:g}"
        rows += [
            ("model" if model is plan.models[0] else "against",
             f"{model.name}{at}: EfficientDet-D{spec.phi}, {spec.num_classes} classes"),
            ("looks", f"{seen}; {config.nms} suppression at {sharp}, score above {config.score:g}, "
             f"{config.detections} an image; {config.batch_size} images at once"),
        ]  # fmt: skip
        rows += [("note", note) for note in (*model.notes, *_strange_sizes(spec, views))]
    rows.append(preflight.describe_data(plan.images.split, plan.images.index, plan.images.name, 0))
    crew = plan.crew
    who = f"{crew.workers} worker(s)" if crew.workers else "this process"
    device = "CPU" if crew.gpus_per_worker == 0 else "GPU where there is one, else CPU"
    rows.append(("who", f"{who}, {device}, {crew.threads} thread(s) each"))
    return rows + [("note", note) for note in plan.notes]


def _strange_sizes(spec: NetworkSpec, views: Sequence[View]) -> list[str]:
    """A level of one cell has learned to see nothing beside it, and cannot be relied on elsewhere."""
    others = any(view.image_size_px != spec.image_size_px for view in views)
    if not others or spec.level_sizes_px()[spec.max_level] > 1:
        return []
    return [
        f"level P{spec.max_level} is one cell at the {spec.image_size_px} px it was trained with: "
        "at other sizes its scores may mean nothing"
    ]
