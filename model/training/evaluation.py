"""COCO average precision, each image scored once whatever the world size.

faster-coco-eval does the matching (pycocotools' numbers, several times quicker); a test holds it
to pycocotools. A metric without ground truth is left out: a missing number is not 0.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from model.data.dataset import DetectionDataset
from model.data.index import CocoIndex
from model.data.loader import evaluation_batches
from model.detection.postprocess import Detections, PostprocessConfig, postprocess

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from faster_coco_eval import COCO, COCOeval_faster

METRICS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
COLUMNS = 7
"""A detection row: image position in the index, x, y, width, height (source pixels), score, label."""


@dataclass(frozen=True)
class Evaluation:
    """What was found and how it scored.

    metrics: "val/AP", "val/AP50", …, "val_class/NAME". rows: all ranks' detections [n, COLUMNS].
    precision: float32 [10, 101, K] over IoU thresholds, recalls and classes, -1 without ground truth.
    The last two are empty but on rank 0.
    """

    metrics: dict[str, float]
    rows: NDArray[np.float64]
    precision: NDArray[np.float32]


NOTHING = Evaluation({}, np.empty((0, COLUMNS)), np.empty((0, 0, 0), dtype=np.float32))


def evaluate(
    detector: nn.Module,
    dataset: DetectionDataset,
    anchors_xyxy: Tensor,
    config: PostprocessConfig,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    autocast: bool,
) -> Evaluation:
    """Metrics on every rank. Collective.

    detector: in eval mode, on `device`. The number of collectives is fixed, whatever a rank holds.
    """
    mine = detect(
        detector,
        dataset.evaluation(),
        anchors_xyxy,
        config,
        rank=rank,
        world_size=world_size,
        batch_size=batch_size,
        workers=workers,
        device=device,
        autocast=autocast,
    )
    rows = gather_rows(mine, world_size, device)
    found = assess(dataset.index, rows) if rank == 0 else NOTHING
    metrics: list[Any] = [found.metrics]
    if world_size > 1:
        dist.broadcast_object_list(metrics, src=0, device=device)
    return replace(found, metrics=metrics[0])


@torch.no_grad()
def detect(
    detector: nn.Module,
    dataset: DetectionDataset,
    anchors_xyxy: Tensor,
    config: PostprocessConfig,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    autocast: bool,
) -> NDArray[np.float64]:
    """Detections of this rank's share of the images, [n, COLUMNS]."""
    found = [np.empty((0, COLUMNS))]
    batches = evaluation_batches(
        dataset,
        rank=rank,
        world_size=world_size,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    for batch in batches:
        on_device = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            class_logits, box_codes = detector(on_device.images)
        results = postprocess(class_logits, box_codes, anchors_xyxy, on_device.sizes_hw, config)
        found.append(as_rows(batch.indices, batch.scales, results))
    return np.concatenate(found)


def as_rows(
    images: Sequence[int] | Tensor, scales: Sequence[float] | Tensor, results: Sequence[Detections]
) -> NDArray[np.float64]:
    """Detections of each image as rows [n, COLUMNS]; scales: their pixels in one of the source."""
    found = [np.empty((0, COLUMNS))]
    for image, scale, result in zip(images, scales, results, strict=True):
        rows = np.empty((len(result.scores), COLUMNS))
        boxes = result.boxes_xyxy.double().numpy() / float(scale)
        rows[:, 0] = int(image)
        rows[:, 1:3] = boxes[:, :2]
        rows[:, 3:5] = boxes[:, 2:] - boxes[:, :2]
        rows[:, 5] = result.scores.double().numpy()
        rows[:, 6] = result.labels.numpy()
        found.append(rows)
    return np.concatenate(found)


def gather_rows(
    rows: NDArray[np.float64], world_size: int, device: torch.device
) -> NDArray[np.float64]:
    """All ranks' rows, ordered by image and then as detected. Two collectives."""
    if world_size > 1:
        count = torch.tensor([len(rows)], device=device)
        counts = [torch.empty_like(count) for _ in range(world_size)]
        dist.all_gather(counts, count)
        padded = torch.zeros(max(int(c) for c in counts), COLUMNS, dtype=torch.float64)
        padded[: len(rows)] = torch.from_numpy(rows)
        padded = padded.to(device)
        parts = [torch.empty_like(padded) for _ in range(world_size)]
        dist.all_gather(parts, padded)
        rows = np.concatenate(
            [part.cpu().numpy()[: int(c)] for part, c in zip(parts, counts, strict=True)]
        )
    return rows[np.argsort(rows[:, 0], kind="stable")]


def score(index: CocoIndex, rows: NDArray[np.float64]) -> dict[str, float]:
    """Detections [n, COLUMNS] against the index's ground truth -> "val/…" and "val_class/…"."""
    return assess(index, rows).metrics


def assess(index: CocoIndex, rows: NDArray[np.float64]) -> Evaluation:
    """Detections [n, COLUMNS] against the index's ground truth, with what figures need of it."""
    if not len(index.labels):
        return replace(NOTHING, rows=rows)
    given = rows
    if not len(rows):  # one box that can match nothing: what has ground truth then scores 0
        rows = np.zeros((1, COLUMNS))
    results = rows.copy()
    results[:, 0] = index.image_ids[rows[:, 0].astype(np.int64)]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = COCO(index.ground_truth())
        evaluator = COCOeval_faster(truth, truth.loadRes(_result_rows(results)), "bbox")
        evaluator.params.imgIds = index.image_ids.tolist()
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    stats = dict(zip(METRICS, (float(v) for v in evaluator.stats), strict=False))
    metrics = {f"val/{name}": value for name, value in stats.items() if value >= 0}
    precision = np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]  # area all, 100 detections
    per_class = _per_class(precision, index)
    return Evaluation(metrics | per_class, given, precision.astype(np.float32))


def _result_rows(rows: NDArray[np.float64]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": int(row[0]),
            "bbox": [float(v) for v in row[1:5]],
            "score": float(row[5]),
            "category_id": int(row[6]),
        }
        for row in rows
    ]


def _per_class(precision: NDArray[np.float64], index: CocoIndex) -> dict[str, float]:
    """AP of each class that has ground truth; precision [10, 101, K]."""
    found = {}
    for label, name in enumerate(index.classes.names):
        values = precision[:, :, label]
        values = values[values > -1]
        if values.size:
            found[f"val_class/{name}"] = float(values.mean())
    return found
