"""A model looks at given images of a dataset, wherever and in whatever turn it is asked to.

Batches are fixed lists of image positions, so what is found in an image does not depend on how many
processes share the work. Without further views it is what `evaluation.detect` computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data.dataset import Batch, DetectionDataset, Sample, collate
from model.detection.anchors import make_anchors
from model.detection.postprocess import (
    Candidates,
    Detections,
    PostprocessConfig,
    best_pairs,
    postprocess,
    suppress,
)
from model.detection.views import View, in_source, mirror, together
from model.network.scaling import NetworkSpec
from model.training.evaluation import COLUMNS, as_rows

PLAIN = 1.0  # results that are in source pixels already

Positions = tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """rows: detections [n, COLUMNS]; damaged: images that could not be read and count as empty."""

    rows: NDArray[np.float64]
    damaged: int


class Examiner:
    """Answers lists of batches of image positions with what a detector finds there."""

    def __init__(
        self,
        detector: torch.nn.Module,
        spec: NetworkSpec,
        dataset: DetectionDataset,
        config: PostprocessConfig,
        views: Sequence[View],
        *,
        device: torch.device,
        autocast: bool,
        readers: int,
    ) -> None:
        """detector: in eval mode, on `device`. views: see `plan_views`. readers: threads that decode
        the next batch meanwhile; 0 decodes in turn.
        """
        self.detector, self.config = detector, config
        self.device, self.autocast = device, autocast
        self.views = tuple(views)
        self.plain = self.views == (View(spec.image_size_px),)
        sizes = dict.fromkeys(view.image_size_px for view in self.views)
        self.datasets = [at_size(dataset, size).evaluation() for size in sizes]
        self.anchors_xyxy = {
            size: make_anchors(replace(spec, image_size_px=size)).to(device) for size in sizes
        }
        self.pool = ThreadPoolExecutor(readers, "decode") if readers else None

    @torch.no_grad()
    def __call__(self, batches: Sequence[Positions]) -> Found:
        """Raises DataError: an unreadable image, where the dataset is to fail at one."""
        rows, damaged = [np.empty((0, COLUMNS))], 0
        for at_sizes in self._loaded(batches):
            rows.append(self._look(at_sizes))
            damaged += int(at_sizes[0].damaged.sum())
        return Found(np.concatenate(rows), damaged)

    def _loaded(self, batches: Sequence[Positions]) -> Iterator[list[Batch]]:
        """Each batch at every size, the next one being decoded while one is looked at."""
        self.datasets[0].read_ahead([(0, image) for batch in batches for image in batch])
        if self.pool is None:
            for batch in batches:
                yield [collate([data[0, image] for image in batch]) for data in self.datasets]
            return
        coming: deque[list[list[Future[Sample]]]] = deque()
        for batch in batches:
            coming.append(
                [
                    [self.pool.submit(data.__getitem__, (0, image)) for image in batch]
                    for data in self.datasets
                ]
            )
            if len(coming) > 1:
                yield _collected(coming.popleft())
        while coming:
            yield _collected(coming.popleft())

    def _look(self, at_sizes: Sequence[Batch]) -> NDArray[np.float64]:
        """One batch -> rows [n, COLUMNS]."""
        on_device = [batch.to(self.device) for batch in at_sizes]
        first = on_device[0]
        if self.plain:
            class_logits, box_codes = self._forward(first.images)
            anchors = self.anchors_xyxy[self.views[0].image_size_px]
            found = postprocess(class_logits, box_codes, anchors, first.sizes_hw, self.config)
            return as_rows(at_sizes[0].indices, at_sizes[0].scales, found)
        by_size = dict(zip(self.anchors_xyxy, on_device, strict=True))
        candidates = [self._candidates(view, by_size[view.image_size_px]) for view in self.views]
        results: list[Detections] = suppress(together(candidates), self.config)
        return as_rows(at_sizes[0].indices, [PLAIN] * len(results), results)

    def _candidates(self, view: View, batch: Batch) -> Candidates:
        """Of one view, in source pixels."""
        images = mirror(batch.images, batch.sizes_hw) if view.flip else batch.images
        class_logits, box_codes = self._forward(images)
        anchors = self.anchors_xyxy[view.image_size_px]
        found = best_pairs(class_logits, box_codes, anchors, batch.sizes_hw, self.config)
        return in_source(found, batch.sizes_hw, batch.scales, flip=view.flip)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            raw: tuple[Tensor, Tensor] = self.detector(images)
        return raw


def _collected(waiting: Sequence[Sequence[Future[Sample]]]) -> list[Batch]:
    return [collate([sample.result() for sample in samples]) for samples in waiting]


def at_size(dataset: DetectionDataset, image_size_px: int) -> DetectionDataset:
    return DetectionDataset(
        dataset.index, dataset.read, image_size_px, dataset.augment, dataset.seed, dataset.on_damage
    )


def in_batches(num_images: int, batch_size: int) -> list[Positions]:
    """As one worker's evaluation composes them."""
    return [
        tuple(range(start, min(start + batch_size, num_images)))
        for start in range(0, num_images, batch_size)
    ]


def in_order(found: Iterable[Found]) -> Found:
    """Of all images together: by image, then as detected."""
    parts = list(found)
    rows = np.concatenate([np.empty((0, COLUMNS)), *(part.rows for part in parts)])
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    return Found(rows, sum(part.damaged for part in parts))
