"""One configuration for a training job; the same tree is what a sweep's dotted paths point into.

Sections that belong to a package below are defined there, beside what they configure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from model.data.shapes import ShapesConfig
from model.data.transforms import AugmentConfig
from model.detection.loss import LossConfig
from model.detection.postprocess import PostprocessConfig
from model.network.scaling import ModelConfig
from model.training.config import OptimConfig, TrainConfig

DEMO = "shapes"


@dataclass(frozen=True)
class SplitConfig:
    """One split, where finding it by itself is not enough.

    annotations: COCO instances json; images: folder of its images; first: keep the images with the
    N lowest ids.
    """

    annotations: str | None = None
    images: str | None = None
    first: int | None = None


@dataclass(frozen=True)
class CacheConfig:
    """Where a remote dataset is kept on each node, and how much of it.

    folder: None is ~/.cache/efficientdet.
    """

    folder: str | None = None
    limit_gib: float = 100.0


@dataclass(frozen=True)
class DataConfig:
    """root: a folder or URL (s3://…) with a COCO-format dataset, or "shapes" for the generated demo.

    classes: names to keep, all where None. loader_workers: processes that decode, per training
    worker (None: 0 on a CPU, up to 8 beside a GPU). check: how many images are decoded before the
    start ("sample" is up to 256). damaged: an image that turns out unreadable later is replaced by
    another one and counted (in evaluation it scores as nothing found), or ends the run.
    """

    root: str = DEMO
    train: SplitConfig = field(default_factory=SplitConfig)
    val: SplitConfig = field(default_factory=SplitConfig)
    classes: tuple[str, ...] | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    loader_workers: int | None = None
    check: Literal["sample", "all", "none"] = "sample"
    damaged: Literal["replace", "fail"] = "replace"
    cache: CacheConfig = field(default_factory=CacheConfig)


@dataclass(frozen=True)
class EvaluationConfig(PostprocessConfig):
    """How detections are made and scored; batch_size: images at once on each worker."""

    batch_size: int = 16


@dataclass(frozen=True)
class CheckpointConfig:
    """uri: where checkpoints go (None: beside the MLflow run's artifacts).

    every_minutes: one is also saved when the last is that old, which bounds what a failure costs.
    part_mib: files of twice that size and more go up to S3 in parts of it, several at once.
    Kept: the `keep_latest` newest, as many of those with an evaluation, and the `keep_best` best by
    `metric`.
    """

    uri: str | None = None
    every_minutes: float | None = 10.0
    part_mib: int = 32
    keep_latest: int = 2
    keep_best: int = 1
    metric: str = "val/AP"


@dataclass(frozen=True)
class LaunchConfig:
    """Who runs it. workers: training processes, or the least of them where max_workers says the most:
    then training begins as soon as there is room for the least, and every grow_every_s takes up what
    has become free (a restart from the newest checkpoint). gpus_per_worker: None is 1 where there are GPUs.

    cpus_per_worker: reserved for each (None: an even share of a local machine, else 1).
    threads_per_worker: of torch on a CPU (None: the node's cores over its workers). Sums split over
    other threads differ in their last digits, so curves to be compared bit for bit need it equal.
    max_failures: restarts after a failure before the run is given up; max_preemptions: after a node
    was taken away with a notice.
    collective_timeout_s: how long ranks wait for one another until the first step is done, and later
    for one that reads data, scores or saves. hang_timeout_s: how long for one that is stuck in a
    step or silent; then the group is restarted.
    """

    launcher: Literal["ray", "local"] = "ray"
    workers: int = 1
    max_workers: int | None = None
    grow_every_s: float = 60.0
    gpus_per_worker: float | None = None
    cpus_per_worker: float | None = None
    threads_per_worker: int | None = None
    max_failures: int = 8
    max_preemptions: int = 100
    collective_timeout_s: int = 1800
    hang_timeout_s: int = 60


@dataclass(frozen=True)
class TrackingConfig:
    """uri: an MLflow server or database (None: sqlite in the output folder).

    required: a first start is refused while it does not answer; a run that has begun always goes on.
    figures: pictures and curves of each evaluation, drawn in a process beside the training.
    system_metrics_every_s: load of each node (None: never). price_per_worker_hour: what one worker
    costs with its GPUs, in any currency.
    """

    uri: str | None = None
    experiment: str = "efficientdet"
    required: bool = True
    figures: bool = True
    system_metrics_every_s: float | None = 10.0
    price_per_worker_hour: float | None = None


@dataclass(frozen=True)
class RunConfig:
    """name: what the run is called (None: dataset and phi). output: local folder for everything."""

    name: str | None = None
    output: str = "runs"


@dataclass(frozen=True)
class TrainJob:
    """A whole training job."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    run: RunConfig = field(default_factory=RunConfig)
