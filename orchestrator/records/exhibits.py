"""All that there is to see of one evaluation: sheets of pictures, and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from model.data.dataset import Reader
from model.data.index import CocoIndex
from model.data.transforms import decode_image
from model.training import analysis
from model.training.evaluation import Evaluation
from orchestrator.records import figures
from orchestrator.records.pictures import Picture, picture_sheet

FIXED, EXTREME = 8, 4
CLASS_PREFIX = "val_class/"


@dataclass(frozen=True)
class Exhibits:
    """One evaluation of the images of an index. step: of the training, where that is known.

    threshold: score of the best F1; what is counted or drawn of boxes is from there on.
    """

    index: CocoIndex
    read: Reader
    evaluation: Evaluation
    step: int | None
    matches: analysis.Matches
    threshold: float

    @classmethod
    def of(
        cls, index: CocoIndex, read: Reader, evaluation: Evaluation, step: int | None
    ) -> Exhibits:
        matches = analysis.match(index, evaluation.rows)
        threshold, _ = analysis.best_f1(index, matches)
        return cls(index, read, evaluation, step, matches, threshold)

    def sheets(
        self, fixed: Sequence[int], fixed_title: str
    ) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Images [H, W, 3] by name: some fixed ones, then the best and the worst."""
        quality = analysis.image_quality(self.index, self.matches, threshold=self.threshold)
        best, worst = analysis.best_and_worst(self.index, quality, num=EXTREME)
        at = "" if self.step is None else f", step {self.step}"
        for key, title, chosen in (
            ("validation", fixed_title, fixed),
            ("validation best", "best images", best),
            ("validation worst", "worst images", worst),
        ):
            title = f"{title}{at}, boxes of score {self.threshold:.2f} and more"
            yield key, self._sheet([int(i) for i in chosen], title)

    def figures(
        self, anchor_ious: NDArray[np.float32], subject: str
    ) -> Iterator[tuple[str, Figure]]:
        """By name. anchor_ious: of the boxes that `subject` names with their best anchors."""
        index, matches, step, threshold = self.index, self.matches, self.step, self.threshold
        names = index.classes.names
        precision = self.evaluation.precision.astype(np.float64)
        counts = analysis.confusion(index, matches, threshold=threshold)
        errors = analysis.error_kinds(index, matches, threshold=threshold)
        yield (
            "precision_recall",
            figures.precision_recall(precision=precision, names=names, step=step),
        )
        yield "class_ap", figures.class_ap(ap=self.class_ap(), step=step)
        yield (
            "confusion",
            figures.confusion_matrix(counts=counts, names=names, threshold=threshold, step=step),
        )
        yield "error_kinds", figures.error_kinds(errors=errors, step=step)
        yield (
            "calibration",
            figures.calibration(calibration=analysis.calibration(matches), step=step),
        )
        yield "anchor_recall", figures.anchor_recall(best_iou=anchor_ious, subject=subject)

    def class_ap(self) -> dict[str, float]:
        return {
            key.removeprefix(CLASS_PREFIX): value
            for key, value in self.evaluation.metrics.items()
            if key.startswith(CLASS_PREFIX)
        }

    def _sheet(self, chosen: Sequence[int], title: str) -> NDArray[np.uint8]:
        pictures = []
        for image in chosen:
            rows = self.evaluation.rows[self.evaluation.rows[:, 0] == image]
            rows = rows[rows[:, 5] >= self.threshold]
            boxes = rows[:, 1:5].copy()
            boxes[:, 2:] += boxes[:, :2]
            true_boxes, true_labels = self.index.training_boxes(image)
            pictures.append(
                Picture(
                    image=self._pixels(image),
                    caption=str(self.index.file_names[image]),
                    boxes_xyxy=boxes, scores=rows[:, 5], labels=rows[:, 6].astype(np.int64),
                    true_boxes_xyxy=true_boxes.astype(np.float64), true_labels=true_labels,
                )
            )  # fmt: skip
        return picture_sheet(pictures=pictures, names=self.index.classes.names, title=title)

    def _pixels(self, image: int) -> NDArray[np.uint8]:
        """RGB; grey where the file cannot be read, which evaluation has said."""
        height, width = (int(side) for side in self.index.sizes_hw[image])
        try:
            picture = decode_image(self.read(str(self.index.file_names[image])))
        except (OSError, SyntaxError, ValueError):
            return np.full((height, width, 3), 128, dtype=np.uint8)
        return np.asarray(picture.convert("RGB"))
