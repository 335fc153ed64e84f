"""The training loop in this process, on a handful of generated pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from model.data.dataset import DetectionDataset
from model.data.folder import FolderReader, find_split
from model.data.index import parse_coco
from model.data.shapes import ShapesConfig, ensure_shapes
from model.data.transforms import AugmentConfig
from model.detection.loss import LossConfig
from model.detection.postprocess import PostprocessConfig
from model.network.detector import Detector
from model.network.scaling import ModelConfig, resolve
from model.training.config import Duration, OptimConfig, Recipe, TrainConfig
from model.training.evaluation import Evaluation
from model.training.fit import FitResult, fit
from model.training.runtime import ProcessGroupRuntime
from orchestrator.config.schema import CheckpointConfig
from orchestrator.storage.checkpoints import CheckpointStore
from orchestrator.storage.filesystems import open_place

TINY_MODEL = ModelConfig(
    backbone="test_efficientnet",
    image_size_px=64,
    max_level=6,
    fpn_channels=16,
    fpn_repeats=1,
    head_layers=1,
    drop_path=0.1,
)


def dataset(folder: Path, number: int = 24) -> DetectionDataset:
    """`number` training pictures of 64 px with augmentation."""
    ensure_shapes(folder, ShapesConfig(num_train=number, num_val=2, size_px=64))
    split = find_split(folder, "train")
    assert split is not None
    index = parse_coco(split.annotations.read_bytes(), split.annotations.name)
    return DetectionDataset(index, FolderReader(split.images), 64, AugmentConfig(), 0)


def recipe(**train: Any) -> Recipe:
    """12 steps of 8 images in groups of 4, logged each step."""
    options: dict[str, Any] = {
        "duration": Duration(steps=12),
        "batch_size": 8,
        "log_every_steps": 1,
        "evaluate_every": Duration(steps=100),
        "checkpoint_every": Duration(steps=100),
    }
    config = TrainConfig(**(options | train))
    return Recipe(
        network=resolve(TINY_MODEL, 6),
        pretrained=False,
        train=config,
        optim=OptimConfig(lr_per_64=0.2, warmup=Duration(steps=3), ema_decay=0.9),
        loss=LossConfig(),
        augment=AugmentConfig(),
        evaluation=PostprocessConfig(),
        evaluation_batch=8,
        loader_workers=0,
        bn_group=config.bn_group or 4,
    )


@dataclass
class Record:
    """What a run logged, in order."""

    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    shown: list[tuple[int, Evaluation]] = field(default_factory=list)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, dict(metrics)))

    def show(self, step: int, evaluation: Evaluation) -> None:
        self.shown.append((step, evaluation))

    def values(self, key: str) -> list[tuple[int, float]]:
        return [(step, metrics[key]) for step, metrics in self.rows if key in metrics]


class StoppingRuntime(ProcessGroupRuntime):
    """One process that is asked to stop after a given number of steps."""

    def __init__(self, store: CheckpointStore, record: Record, stop_after: int | None) -> None:
        super().__init__(rank=0, world_size=1, device=torch.device("cpu"), store=store, sink=record)
        self.record, self.stop_after = record, stop_after

    def stop_code(self) -> int:
        done = self.record.rows[-1][0] if self.record.rows else 0
        return int(self.stop_after is not None and done >= self.stop_after)

    def stop_reason(self, code: int) -> str | None:
        return "asked to" if code else None


def run(
    data: DetectionDataset,
    folder: Path,
    record: Record,
    *,
    stop_after: int | None = None,
    lr_per_64: float | None = None,
    initial: Callable[[Detector], object] | None = None,
    **train: Any,
) -> tuple[FitResult, CheckpointStore]:
    """fit() with checkpoints in `folder`; goes on from the newest one there."""
    torch.set_num_threads(1)
    asked = recipe(**train)
    if lr_per_64 is not None:
        asked = replace(asked, optim=replace(asked.optim, lr_per_64=lr_per_64))
    store = CheckpointStore(open_place(str(folder), "test"), CheckpointConfig(), say=print)
    runtime = StoppingRuntime(store, record, stop_after)
    result = fit(asked, data, data, runtime, {"network": {}}, initial)
    return result, store
