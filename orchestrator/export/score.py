"""AP of a file: the validation images through its own runtime, scored as training scores them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.data.dataset import Batch, DetectionDataset
from model.data.index import ClassMap, CocoIndex
from model.data.loader import evaluation_batches
from model.data.transforms import AugmentConfig
from model.detection.postprocess import Detections, postprocess
from model.predictor import Predictor
from model.training.evaluation import as_rows, score
from model.training.state import CONFIG
from orchestrator.config.schema import DataConfig, SplitConfig, TrainJob
from orchestrator.errors import ConfigError, DataError
from orchestrator.export.check import anchors_of, detections_of
from orchestrator.export.graph import Graph, Run, as_arrays
from orchestrator.launch.resolve import find_one_split

AP = "val/AP"
CPU = torch.device("cpu")
BATCH_SIZE = 4


def validation_data(
    root: str, checkpoint: Path, classes: ClassMap, graph: Graph, num_images: int | None
) -> DetectionDataset:
    """The validation images of a dataset at the graph's size; num_images: those with the lowest ids.

    Raises:
        UserError: no such data, none of these classes, or a size that it is not scored at.
    """
    height, width = graph.native_hw
    if height != width:
        raise ConfigError(
            "--data", "a square --image-size, as evaluation has", f"{height}x{width}",
            "leave one of them out",
        )  # fmt: skip
    asked = DataConfig(root=root, val=SplitConfig(first=num_images))
    split, _ = find_one_split(TrainJob(data=asked), "val")
    if split is None:
        raise DataError("--data", "annotations/*val*.json", f"none in {root}", "see the README")
    index = split.index(_kept_classes(checkpoint))
    _check_classes(index, classes)
    if not len(index.labels):
        raise DataError(index.name, "at least one box", "none", "give annotated images")
    return DetectionDataset(
        index, split.reader(), height, AugmentConfig(enabled=False), 0, "blank"
    )  # fmt: skip


def ap_of_file(run: Run, graph: Graph, dataset: DetectionDataset) -> float:
    """COCO's AP of what the file finds."""
    anchors = anchors_of(graph, *graph.native_hw)

    def detect(batch: Batch) -> Sequence[Detections]:
        found = run(*as_arrays(graph.arguments(batch.images.contiguous(), batch.sizes_hw)))
        if graph.content == "detections":
            return detections_of(found)
        logits, codes = (torch.from_numpy(array) for array in found)
        return postprocess(logits, codes, anchors, batch.sizes_hw, graph.config)

    return _score(
        dataset,
        (as_rows(batch.indices, batch.scales, detect(batch)) for batch in _batches(dataset)),
    )


def ap_of_torch(predictor: Predictor, graph: Graph, dataset: DetectionDataset) -> float:
    """The same of the network in PyTorch, in float32."""
    anchors = anchors_of(graph, *graph.native_hw)

    @torch.no_grad()
    def detect(batch: Batch) -> Sequence[Detections]:
        logits, codes = predictor.detector(batch.images)
        return postprocess(logits, codes, anchors, batch.sizes_hw, graph.config)

    return _score(
        dataset,
        (as_rows(batch.indices, batch.scales, detect(batch)) for batch in _batches(dataset)),
    )


def _kept_classes(checkpoint: Path) -> tuple[str, ...] | None:
    """Those that training chose of its data's, where it did."""
    job = json.loads((checkpoint / CONFIG).read_text()).get("job", {})
    kept = job.get("data", {}).get("classes")
    return None if kept is None else tuple(kept)


def _check_classes(index: CocoIndex, classes: ClassMap) -> None:
    if index.classes == classes:
        return
    theirs, ours = (
        dict(zip(c.category_ids, c.names, strict=True)) for c in (index.classes, classes)
    )
    number = min(i for i in theirs.keys() | ours.keys() if theirs.get(i) != ours.get(i))
    there, here = (names.get(number, "none") for names in (theirs, ours))
    raise DataError(
        index.name, f"the {len(ours)} categories that the model was trained on",
        f"category {number}: {there} in the data, {here} in the model",
        "give the data it was trained on",
    )  # fmt: skip


def _batches(dataset: DetectionDataset) -> Iterator[Batch]:
    return evaluation_batches(
        dataset, rank=0, world_size=1, batch_size=BATCH_SIZE, workers=0, device=CPU
    )


def _score(dataset: DetectionDataset, rows: Iterator[NDArray[np.float64]]) -> float:
    return score(dataset.index, np.concatenate(list(rows)))[AP]
