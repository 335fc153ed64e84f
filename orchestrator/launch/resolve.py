"""From what was asked to what will run: every default filled in once, on the driver.

The result is plain data that travels to the workers; nothing is decided there again.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from model.data.dataset import DetectionDataset, Reader
from model.data.folder import FolderReader, SplitPaths, find_images, find_split
from model.data.index import CocoIndex, parse_coco
from model.data.sampler import BatchPlan, default_group_size, plan_batch
from model.data.shapes import ensure_shapes
from model.network.effdet_format import PUBLISHED
from model.network.footprint import NetworkCost, network_cost
from model.network.scaling import resolve
from model.training.config import Recipe
from model.training.state import network_config
from model.training.step import Schedule
from orchestrator.config.codec import encode
from orchestrator.config.schema import DEMO, CacheConfig, SplitConfig, TrainJob
from orchestrator.errors import ConfigError, DataError, StorageError, UserError
from orchestrator.storage.cache import CachedReader, NodeCache
from orchestrator.storage.filesystems import is_remote, open_path, reason

RAY_PACKAGE = "_ray_pkg_"


@dataclass(frozen=True)
class Split:
    """Where a split's annotations and images lie, absolute; first: keep the lowest N ids.

    Remote ones go through the cache of the node that asks.
    """

    annotations: Path
    images: Path
    first: int | None
    cache: CacheConfig

    def reader(self) -> Reader:
        if is_remote(self.images):
            return CachedReader(self.images, node_cache(self.cache))
        return FolderReader(self.images)

    def index(self, classes: tuple[str, ...] | None) -> CocoIndex:
        """Raises DataError: see `model.data.index.parse_coco`."""
        try:
            text = read_annotations(self.annotations, self.cache)
        except OSError as error:
            raise DataError(
                "data", "an annotation file", f"{self.annotations} ({error.strerror})",
                "name it: --set data.train.annotations=PATH",
            ) from None  # fmt: skip
        index = parse_coco(text, self.annotations.name, classes)
        return index.first(self.first) if self.first else index


def node_cache(config: CacheConfig) -> NodeCache:
    folder = Path(config.folder or "~/.cache/efficientdet").expanduser()
    return NodeCache(folder, int(config.limit_gib * 2**30))


def read_annotations(path: Path, cache: CacheConfig) -> bytes:
    """Raises OSError, StorageError."""
    return node_cache(cache).whole(path) if is_remote(path) else path.read_bytes()


@dataclass(frozen=True)
class ResolvedJob:
    """A job with nothing left open. Picklable."""

    job: TrainJob
    recipe: Recipe
    train: Split
    val: Split
    output: Path
    name: str
    notes: tuple[str, ...]

    def config(self) -> dict[str, Any]:
        """What is stored with checkpoints and the run."""
        job = encode(self.job)
        # Where it was tracked is no part of what was trained, and the URI may hold a password.
        del job["tracking"]["uri"]
        return {
            "job": job,
            "network": network_config(self.recipe.network),
            "bn_group": self.recipe.bn_group,
            "pretrained": self.recipe.pretrained,
        }

    def key(self) -> str:
        """The same for the same name and training, however many workers run it."""
        asked = encode(self.job)
        same = {k: asked[k] for k in ("model", "data", "train", "optim", "loss", "evaluation")}
        for section, operational in (
            ("data", ("check", "loader_workers", "cache")),
            ("train", ("max_images_at_once", "log_every_steps")),
        ):
            for name in operational:
                del same[section][name]
        text = json.dumps([self.name, same, self.config()["network"]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def datasets(self) -> tuple[DetectionDataset, DetectionDataset]:
        """Training and validation data, read anew."""
        data, recipe = self.job.data, self.recipe

        def dataset(split: Split) -> DetectionDataset:
            return DetectionDataset(
                split.index(data.classes), split.reader(),
                recipe.network.image_size_px, recipe.augment, recipe.train.seed, data.damaged,
            )  # fmt: skip

        train = dataset(self.train)
        return train, train if self.val == self.train else dataset(self.val)


@dataclass(frozen=True)
class Derived:
    """Numbers that follow from a job and its data; printed and logged before step 0."""

    cost: NetworkCost
    plan: BatchPlan
    schedule: Schedule
    num_train: int
    num_val: int


def resolve_job(job: TrainJob) -> tuple[ResolvedJob, CocoIndex, CocoIndex]:
    """Find the data, fix every dimension.

    Raises:
        UserError: anything that could not work.
    """
    _check_numbers(job)
    job = as_published(job)
    output, notes = output_folder(job)
    train, val, more = find_splits(job, output)
    notes += more
    train_index = train.index(job.data.classes)
    val_index = train_index if val == train else val.index(job.data.classes)
    if val_index.classes != train_index.classes:
        raise DataError(
            f"{val.annotations.name}", f"the categories of {train.annotations.name}",
            "another list", "export both splits from the same categories",
        )  # fmt: skip
    for index in (train_index, val_index):
        if not len(index):
            raise DataError(index.name, "at least one image", "none", "add images")
    if not len(train_index.labels):
        raise DataError(train_index.name, "at least one box", "none", "annotate some images")

    resolved = _complete(job, train, val, output, tuple(notes), train_index.classes.num_classes)
    return resolved, train_index, val_index


def with_job(resolved: ResolvedJob, job: TrainJob) -> ResolvedJob:
    """Another job on the same data, which is not read again.

    Raises:
        ConfigError: see `resolve_job`.
    """
    _check_numbers(job)
    job = as_published(job)
    num_classes = resolved.recipe.network.num_classes
    return _complete(job, resolved.train, resolved.val, resolved.output, (), num_classes)


def _complete(
    job: TrainJob, train: Split, val: Split, output: Path, notes: tuple[str, ...], num_classes: int
) -> ResolvedJob:
    spec = resolve(job.model, num_classes)
    demo = _is_demo(job)
    pretrained = job.model.pretrained == "yes"
    if job.model.pretrained == "auto":
        pretrained = not demo and job.model.init is None
    group = job.train.bn_group or default_group_size(job.train.batch_size, job.model.phi)
    recipe = Recipe(
        network=spec,
        pretrained=pretrained,
        train=job.train,
        optim=job.optim,
        loss=job.loss,
        augment=job.data.augment,
        evaluation=job.evaluation,
        evaluation_batch=job.evaluation.batch_size,
        loader_workers=job.data.loader_workers or 0,
        bn_group=group,
        freeze=job.model.freeze,
    )
    name = job.run.name or f"{Path(job.data.root).name}-d{job.model.phi}"
    return ResolvedJob(job, recipe, train, val, output, name, notes)


def derive(resolved: ResolvedJob, num_train: int, num_val: int) -> Derived:
    """Raises ConfigError where batch, groups and workers do not fit together."""
    train = resolved.job.train
    if num_train < train.batch_size:
        raise ConfigError(
            "train.batch_size", f"at most the {num_train} training images",
            str(train.batch_size), "lower it or add images",
        )  # fmt: skip
    plan = plan_batch(
        train.batch_size, resolved.recipe.bn_group, resolved.job.launch.workers,
        train.max_images_at_once,
    )  # fmt: skip
    launch = resolved.job.launch
    for workers in range(launch.workers + 1, (launch.max_workers or 0) + 1):
        try:
            plan_batch(
                train.batch_size, resolved.recipe.bn_group, workers, train.max_images_at_once
            )
        except ConfigError as error:
            raise ConfigError(
                "launch.max_workers", "a batch for every number of workers up to it",
                f"none for {workers} ({error.expected}, got {error.got})",
                f"--workers {launch.workers}:{workers - 1}, or {error.remedy}",
            ) from None  # fmt: skip
    spec = resolved.recipe.network
    if plan.group_size == 1 and spec.level_sizes_px()[spec.max_level] == 1:
        raise ConfigError(
            "train.bn_group", f"at least 2 (level P{spec.max_level} is one cell at "
            f"{spec.image_size_px} px)", "1", "choose a larger group or image size",
        )  # fmt: skip
    schedule = Schedule.of(resolved.recipe, num_train)
    return Derived(network_cost(resolved.recipe.network), plan, schedule, num_train, num_val)


def output_folder(job: TrainJob) -> tuple[Path, list[str]]:
    """Absolute. A relative one inside Ray's unpacked copy of the code would go with the job."""
    output = Path(job.run.output).expanduser()
    if not output.is_absolute() and RAY_PACKAGE in str(Path.cwd()):
        output = Path(os.environ.get("HOME", "/tmp")) / "efficientdet" / output
        return output, [f"submitted as a Ray job: output goes to {output}"]
    return output.absolute(), []


def as_published(job: TrainJob) -> TrainJob:
    """A published name says which network it is; a local path stays the same place on a worker.

    Raises:
        ConfigError: it contradicts the rest of the configuration.
    """
    model = job.model
    if model.init is None:
        return job
    if model.pretrained == "yes":
        raise ConfigError(
            "model.pretrained", "no beside model.init, which brings a backbone", "yes",
            "give one of them",
        )  # fmt: skip
    published = PUBLISHED.get(model.init)
    if published is None:
        if "://" not in model.init and Path(model.init).expanduser().exists():
            absolute = str(Path(model.init).expanduser().absolute())
            return replace(job, model=replace(model, init=absolute))
        return job
    if published.phi != model.phi:
        raise ConfigError(
            "model.phi",
            f"{published.phi}, as {model.init} has",
            model.phi,
            f"--phi {published.phi}",
        )
    return replace(job, model=replace(model, variant=published.variant))


def _is_demo(job: TrainJob) -> bool:
    """A folder that happens to be called shapes is somebody's data."""
    data = job.data
    return data.root == DEMO and data.train.annotations is None and not Path(DEMO).is_dir()


def find_one_split(job: TrainJob, name: Literal["train", "val"]) -> tuple[Split | None, list[str]]:
    """One split of a job's data, None where there is none, and what to say of it.

    Raises:
        UserError: not where it was said to be.
    """
    output, notes = output_folder(job)
    root, more = _root(job, output)
    config = {"train": job.data.train, "val": job.data.val}[name]
    return _split(config, root, name, job.data.cache), notes + more


def _root(job: TrainJob, output: Path) -> tuple[Path, list[str]]:
    """Where the data lie, and what to say of it; the demo is made first."""
    if not _is_demo(job):
        return open_path(job.data.root, "data.root"), []
    root = output / "data" / DEMO
    try:
        made = ensure_shapes(root, job.data.shapes)
    except (FileExistsError, OSError) as error:
        raise DataError(
            "data.shapes", "room for the demo dataset", str(error),
            "remove it or choose another --output",
        ) from None  # fmt: skip
    return root, [f"demo dataset shapes {'drawn' if made else 'found'} in {root}"]


def find_splits(job: TrainJob, output: Path) -> tuple[Split, Split, list[str]]:
    """Where training and validation data lie, and what to say of it. Nothing is read but the demo made.

    Raises:
        UserError: not where they were said to be.
    """
    data = job.data
    root, notes = _root(job, output)
    train = _split(data.train, root, "train", data.cache)
    if train is None:
        raise DataError(
            "data.root", "annotations/*train*.json", f"none in {root}",
            "see the README for the layouts, or --set data.train.annotations=PATH",
        )  # fmt: skip
    val = _split(data.val, root, "val", data.cache)
    if val is None:
        notes.append("no *val*.json found: evaluating on the TRAINING images")
        val = train
    return train, val, notes


def _split(config: SplitConfig, root: Path, name: str, cache: CacheConfig) -> Split | None:
    """Raises DataError, StorageError: not where it was said to be."""
    try:
        return _find(config, root, name, cache)
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:  # each filesystem has its own exceptions
        if not is_remote(root):
            raise
        raise StorageError(
            "data.root", "a dataset that can be read", f"{root} ({reason(error)})",
            "check the URL, AWS_ENDPOINT_URL and the credentials",
        ) from None  # fmt: skip


def _find(config: SplitConfig, root: Path, name: str, cache: CacheConfig) -> Split | None:
    def read(path: Path) -> bytes:
        return read_annotations(path, cache)

    if config.annotations is None:
        if config.images is not None:
            raise ConfigError(
                f"data.{name}.annotations", f"a path beside data.{name}.images", "nothing",
                f"--set data.{name}.annotations=PATH",
            )  # fmt: skip
        found = find_split(root.absolute(), name, read)
        if found is None:
            return None
    else:
        annotations = open_path(config.annotations, f"data.{name}.annotations").absolute()
        if not annotations.is_file():
            raise DataError(
                f"data.{name}.annotations", "a json file", f"none at {annotations}", "correct it"
            )
        if config.images is None:
            found = SplitPaths(
                annotations, find_images(annotations.parent.parent, annotations, name, name, read)
            )
        else:
            images = open_path(config.images, f"data.{name}.images").absolute()
            found = SplitPaths(annotations, images)
    if not found.images.is_dir():
        raise DataError(f"data.{name}.images", "a folder", f"none at {found.images}", "correct it")
    return Split(found.annotations, found.images, config.first, cache)


def _check_numbers(job: TrainJob) -> None:
    """Ranges that types cannot express."""
    augment = job.data.augment
    for where, given, least in (
        ("launch.workers", job.launch.workers, 1),
        ("launch.threads_per_worker", job.launch.threads_per_worker, 1),
        ("launch.max_workers", job.launch.max_workers, job.launch.workers),
        ("launch.grow_every_s", job.launch.grow_every_s, 1),
        ("launch.max_failures", job.launch.max_failures, 0),
        ("launch.max_preemptions", job.launch.max_preemptions, 0),
        ("launch.collective_timeout_s", job.launch.collective_timeout_s, 1),
        ("launch.hang_timeout_s", job.launch.hang_timeout_s, 8),
        ("launch.gpus_per_worker", job.launch.gpus_per_worker, 0),
        ("train.batch_size", job.train.batch_size, 1),
        ("train.bn_group", job.train.bn_group, 1),
        ("train.max_images_at_once", job.train.max_images_at_once, 1),
        ("train.log_every_steps", job.train.log_every_steps, 1),
        ("train.seed", job.train.seed, 0),
        ("data.train.first", job.data.train.first, 1),
        ("data.val.first", job.data.val.first, 1),
        ("data.loader_workers", job.data.loader_workers, 0),
        ("evaluation.batch_size", job.evaluation.batch_size, 1),
        # With one there would be nothing to go back to when it is damaged.
        ("checkpoint.keep_latest", job.checkpoint.keep_latest, 2),
        ("checkpoint.part_mib", job.checkpoint.part_mib, 5),  # S3's least
        ("checkpoint.keep_best", job.checkpoint.keep_best, 0),
        ("tracking.system_metrics_every_s", job.tracking.system_metrics_every_s, 1),
        ("tracking.price_per_worker_hour", job.tracking.price_per_worker_hour, 0),
    ):
        if given is not None and given < least:
            raise ConfigError(where, f"at least {least}", str(given))
    every = job.checkpoint.every_minutes
    for where, ok, expected, got in (
        ("checkpoint.every_minutes", every is None or every > 0, "a positive number, or null", every),
        ("optim.lr_per_64", job.optim.lr_per_64 > 0, "a positive number", job.optim.lr_per_64),
        ("optim.ema_decay", 0 <= job.optim.ema_decay < 1, "0 <= decay < 1", job.optim.ema_decay),
        ("train.bn_momentum", 0 < job.train.bn_momentum <= 1, "0 < momentum <= 1", job.train.bn_momentum),
        ("optim.momentum", 0 <= job.optim.momentum < 1, "0 <= momentum < 1", job.optim.momentum),
        ("data.augment.flip", 0 <= augment.flip <= 1, "a probability", augment.flip),
        ("data.augment.jitter_min", 0 < augment.jitter_min <= augment.jitter_max,
         "0 < jitter_min <= jitter_max", f"{augment.jitter_min}..{augment.jitter_max}"),
    ):  # fmt: skip
        if not ok:
            raise ConfigError(where, expected, str(got))
