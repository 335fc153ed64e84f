"""A model that is to be scored on a dataset, whatever it is kept as.

Checkpoints and weight files alike become the files of a checkpoint whose classes are the dataset's,
in its order. Where the model knows others too, its class predictor is cut to them by name, as
training's --init does it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.data.coco_classes import COCO_NAMES
from model.data.index import ClassMap, CocoIndex
from model.network.detector import Detector
from model.network.effdet_format import PUBLISHED
from model.network.scaling import NetworkSpec, resolve
from model.training.initial import ANEW, COCO_OUTPUTS, load_initial
from model.training.initial import WHERE as INIT
from model.training.state import (
    CONFIG,
    META,
    Progress,
    network_config,
    read_classes,
    read_network,
    verify_checkpoint,
    write_checkpoint,
)
from orchestrator.config import codec
from orchestrator.config.schema import EvaluationConfig, TrainJob
from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.launch.packed_model import PackedModel
from orchestrator.records.sources import FORMS, open_model
from orchestrator.storage.weights import open_initial

OF_THE_MODEL = ("model", "data", "evaluation", "train", "run")
"""Sections of a checkpoint's configuration that matter here."""
KEPT_OF_DATA = ("classes", "shapes", "cache", "damaged", "loader_workers")
"""Settings of its data that also hold for other data."""
NAMED = 5  # classes in an error


@dataclass(frozen=True)
class Source:
    """A model by one of its names, as a local path. job: configuration it was trained with, {} of a
    weight file; step: of its training.
    """

    name: str
    path: Path
    job: Mapping[str, Any]
    step: int | None

    @property
    def is_checkpoint(self) -> bool:
        return self.path.is_dir()


@dataclass(frozen=True)
class EvaluatedModel:
    """Ready to be sent to workers. spec: its network, of the dataset's classes; notes: what to say."""

    name: str
    packed: PackedModel
    spec: NetworkSpec
    evaluation: EvaluationConfig
    step: int | None
    notes: tuple[str, ...]


@contextmanager
def open_source(name: str, tracking_uri: str) -> Iterator[Source]:
    """Raises UserError: not there, damaged, or neither a checkpoint nor weights."""
    if name.startswith(("runs:/", "models:/")):
        with open_model(name, tracking_uri) as folder:
            yield _checkpoint(name, folder)
        return
    with _as_model(name), open_initial(name, "MODEL") as path:
        if not path.is_dir():
            yield Source(name, path, {}, None)
            return
        if not (path / META).is_file():
            raise ConfigError("MODEL", f"a checkpoint folder with {META}", name, FORMS)
        verify_checkpoint(path)
        yield _checkpoint(name, path)


def _checkpoint(name: str, folder: Path) -> Source:
    try:
        config, meta = (json.loads((folder / file).read_text()) for file in (CONFIG, META))
        job, step = config.get("job", {}), int(meta["step"])
        read_network(folder), read_classes(folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {folder.name}", f"a detector's {CONFIG}",
            f"another ({type(error).__name__}: {error})", "use a checkpoint of jobs/train.py",
        ) from None  # fmt: skip
    return Source(name, folder, job, step)


@contextmanager
def _as_model(name: str) -> Iterator[None]:
    """What is wrong with weights to start from is here wrong with the model."""
    try:
        yield
    except ConfigError as error:
        if error.where != INIT:
            raise
        raise ConfigError(f"MODEL {name}", error.expected, error.got, error.remedy) from None


def configured(source: Source, changes: Mapping[str, Any]) -> TrainJob:
    """What the model was trained and validated with, changed as asked.

    Other data (data.root) begin with nothing of the model's own but its classes.

    Raises:
        ConfigError: a setting that is not understood or cannot work.
    """
    base: dict[str, Any] = {name: source.job[name] for name in OF_THE_MODEL if name in source.job}
    data = dict(base.get("data", {}))
    if "root" in changes.get("data", {}):
        data = {name: data[name] for name in KEPT_OF_DATA if name in data}
    base["data"] = data | {"check": "none"}  # what is unreadable is counted
    if source.is_checkpoint:
        changes = {name: value for name, value in changes.items() if name != "model"}
    job = codec.decode(TrainJob, codec.merge(base, changes))
    if not source.is_checkpoint:
        job = _with_network(source, job, changes)
    _check(job.evaluation)
    return job


def _with_network(source: Source, job: TrainJob, changes: Mapping[str, Any]) -> TrainJob:
    """A published name, or file, says which network it is."""
    by_file = {one.file: one for one in PUBLISHED.values() if one.file is not None}
    told = PUBLISHED.get(source.name) or by_file.get(source.path.name)
    if told is None:
        return job
    if "phi" in changes.get("model", {}) and job.model.phi != told.phi:
        raise ConfigError(
            "--phi", f"{told.phi}, as {source.name} has", job.model.phi, "leave it out"
        )
    return replace(job, model=replace(job.model, phi=told.phi, variant=told.variant))


def _check(config: EvaluationConfig) -> None:
    for where, ok, expected, got in (
        ("evaluation.score", 0 <= config.score < 1, "0 <= score < 1", config.score),
        ("evaluation.iou", 0 < config.iou <= 1, "0 < IoU <= 1", config.iou),
        ("evaluation.sigma", config.sigma > 0, "more than 0", config.sigma),
        ("evaluation.detections", config.detections >= 1, "at least 1", config.detections),
        ("evaluation.candidates", config.candidates >= 1, "at least 1", config.candidates),
        ("evaluation.batch_size", config.batch_size >= 1, "at least 1", config.batch_size),
    ):
        if not ok:
            raise ConfigError(where, expected, f"{got:g}")


def fit_to(source: Source, job: TrainJob, index: CocoIndex) -> EvaluatedModel:
    """The model for the classes of a dataset.

    Raises:
        ConfigError: it does not know all of them, or its weights are another network's.
    """
    classes = index.classes
    if source.is_checkpoint:
        theirs = read_classes(source.path)
        if theirs == classes:
            packed, spec = PackedModel.of(source.path), read_network(source.path)
            return EvaluatedModel(source.name, packed, spec, job.evaluation, source.step, ())
        _refuse_unknown(source, classes, theirs.names, index.name)
        spec = replace(read_network(source.path), num_classes=classes.num_classes)
    else:
        spec = resolve(job.model, classes.num_classes)
    packed, notes = _converted(source, job, spec, index)
    return EvaluatedModel(source.name, packed, spec, job.evaluation, source.step, notes)


def _refuse_unknown(
    source: Source, classes: ClassMap, known: tuple[str, ...], dataset: str
) -> None:
    missing = [name for name in classes.names if name not in known]
    if missing:
        raise ConfigError(
            f"MODEL {source.name}", f"a model of the {classes.num_classes} classes of {dataset}",
            f"one without {_some(missing)} (it knows {_some(known)})",
            "score those it knows: --set data.classes=[A,B], or give the data it was made for",
        )  # fmt: skip


def _some(names: list[str] | tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in names[:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _converted(
    source: Source, job: TrainJob, spec: NetworkSpec, index: CocoIndex
) -> tuple[PackedModel, tuple[str, ...]]:
    """A checkpoint of the same weights with the dataset's classes, and what was kept of them."""
    detector = Detector(spec)
    with _as_model(source.name):
        notes = load_initial(detector, source.path, index.classes)
    anew = [note for note in notes if ANEW in note]
    if anew:
        if f"{COCO_OUTPUTS} classes there" in anew[0]:
            _refuse_unknown(source, index.classes, tuple(COCO_NAMES.values()), index.name)
        raise ConfigError(
            f"MODEL {source.name}", f"weights for the {index.classes.num_classes} classes of {index.name}",
            anew[0].replace(ANEW, "would start anew"), "train it for them first (--init)",
        )  # fmt: skip
    train = codec.encode(job.train)
    with tempfile.TemporaryDirectory(prefix="converted-") as temporary:
        folder = Path(temporary)
        write_checkpoint(
            folder, model={}, ema=detector.state_dict(),
            progress=Progress(source.step or 0, {}, torch.zeros(0)),
            config={
                "network": network_config(spec),
                "job": {"evaluation": codec.encode(job.evaluation), "train": train},
            },
            classes=index.classes, metrics={},
        )  # fmt: skip
        return PackedModel.of(folder), tuple(notes)


def short_name(source: Source, job: TrainJob) -> str:
    """For a folder: the run and step, or the weights."""
    if source.is_checkpoint:
        data = Path(str(source.job.get("data", {}).get("root", "model"))).name
        run = job.run.name or f"{data}-d{read_network(source.path).phi}"
        name = f"{run}-step{source.step}"
    else:
        name = Path(source.name).stem
    return re.sub(r"[^\w.-]+", "-", name)
