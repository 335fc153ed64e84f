"""COCO annotations as they stand in the file, for whoever looks for mistakes.

`index.py` refuses at the first mistake and drops what cannot be trained on. Here everything that
can be read is kept, and every row that cannot is counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.data.findings import Finding, finding

NOWHERE = -1


@dataclass(frozen=True)
class RawAnnotations:
    """Images in the order of their ids, boxes in the order of the file.

    sizes_hw float64 [N] (NaN: not given); owners int64 [M]: position of the image, -1 for none;
    labels int64 [M]: position in category_ids, -1 for none; xywh float64 [M, 4] as written, NaN
    where a value is no number; area float64 [M], NaN where none is given; crowd bool [M].
    """

    name: str
    image_ids: NDArray[np.int64]
    file_names: list[str]
    sizes_hw: NDArray[np.float64]
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]
    annotation_ids: NDArray[np.int64]
    owners: NDArray[np.int64]
    labels: NDArray[np.int64]
    xywh: NDArray[np.float64]
    area: NDArray[np.float64]
    crowd: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.image_ids)

    def usable(self) -> NDArray[np.bool_]:
        """[M]: boxes of a known image and class, with finite numbers."""
        return (self.owners >= 0) & (self.labels >= 0) & np.isfinite(self.xywh).all(axis=1)

    def corners(self) -> NDArray[np.float64]:
        """Boxes as xyxy [M, 4], clipped to their image where its size is known."""
        limit = np.full((len(self.owners), 2), np.inf)
        known = self.owners >= 0
        limit[known] = self.sizes_hw[self.owners[known]][:, ::-1]
        limit = np.where(np.isfinite(limit), limit, np.inf)
        low = self.xywh[:, :2]
        return np.concatenate(
            [np.clip(low, 0, limit), np.clip(low + self.xywh[:, 2:], 0, limit)], axis=1
        )

    def first(self, num_images: int) -> RawAnnotations:
        """The images with the lowest ids and their boxes; a box of no image stays."""
        stop = min(num_images, len(self))
        return replace(
            self._boxes(self.owners < stop), image_ids=self.image_ids[:stop],
            file_names=self.file_names[:stop], sizes_hw=self.sizes_hw[:stop],
        )  # fmt: skip

    def only(self, classes: Sequence[str]) -> RawAnnotations:
        """Boxes of other classes are left out; those of no class stay."""
        kept = [k for k, name in enumerate(self.category_names) if name in set(classes)]
        label = np.full(len(self.category_ids) + 1, NOWHERE - 1)
        label[kept], label[NOWHERE] = np.arange(len(kept)), NOWHERE
        labels = label[self.labels]
        named = replace(
            self,
            labels=labels,
            category_ids=tuple(self.category_ids[k] for k in kept),
            category_names=tuple(self.category_names[k] for k in kept),
        )
        return named._boxes(labels >= NOWHERE)

    def _boxes(self, kept: NDArray[np.bool_]) -> RawAnnotations:
        columns = ("annotation_ids", "owners", "labels", "xywh", "area", "crowd")
        return replace(self, **{column: getattr(self, column)[kept] for column in columns})


def read_raw(text: bytes, where: str, name: str) -> tuple[RawAnnotations | None, list[Finding]]:
    """Everything that can be read of an instances json, and what cannot; None if nothing can.

    where: the split, for the findings.
    """
    try:
        document = json.loads(text, object_hook=_without_outline)
    except (ValueError, RecursionError) as error:  # not json, not text
        why = " ".join(str(error).split())
        return None, finding(
            "error", "json", where, f"{name} is not json: {why}", 1, "export the annotations again"
        )
    lists = {
        key: document.get(key) if isinstance(document, dict) else None
        for key in ("images", "annotations", "categories")
    }
    absent = [key for key, value in lists.items() if not isinstance(value, list)]
    if absent:
        return None, finding(
            "error", "not-coco", where, f"{name} has no list of {', '.join(absent)}", 1,
            "give the instances json of a COCO-format dataset; jobs/convert.py makes one of VOC or YOLO",
        )  # fmt: skip
    return _raw(lists["images"] or [], lists["annotations"] or [], lists["categories"] or [],
                where, name)  # fmt: skip


def _without_outline(row: dict[str, Any]) -> dict[str, Any]:
    """Outlines are most of a large file and no part of what is looked at: gone before the next row."""
    row.pop("segmentation", None)
    row.pop("keypoints", None)
    return row


class _Rows:
    """Reads rows one by one; those that cannot be read are told apart by what is wrong with them."""

    def __init__(self, kind: str) -> None:
        self.kind, self.wrong = kind, dict[str, list[str]]()
        self.total = dict[str, int]()

    def read(self, rows: list[Any], parse: Callable[[dict[str, Any]], Any]) -> list[Any]:
        found = []
        for number, row in enumerate(rows):
            try:
                found.append(parse(row))
            except KeyError as error:
                self._count(f"no {error}", row, number)
            except (TypeError, ValueError, AttributeError, OverflowError) as error:
                self._count(" ".join(str(error).split())[:80], row, number)
        return found

    def _count(self, why: str, row: Any, number: int) -> None:
        self.total[why] = self.total.get(why, 0) + 1
        examples = self.wrong.setdefault(why, [])
        if len(examples) < 3:
            given = row.get("id") if isinstance(row, dict) else None
            examples.append(f"id {given}" if given is not None else f"row {number}")

    def findings(self, where: str, fields: str) -> list[Finding]:
        return [
            Finding("error", f"{self.kind}-row", where, f"{self.kind} rows that cannot be read: {why}",
                    self.total[why], tuple(examples), f"each needs {fields}")
            for why, examples in self.wrong.items()
        ]  # fmt: skip


def _raw(
    images: list[Any], annotations: list[Any], categories: list[Any], where: str, name: str
) -> tuple[RawAnnotations, list[Finding]]:
    image_rows, category_rows, box_rows = _Rows("image"), _Rows("category"), _Rows("annotation")
    named = category_rows.read(categories, lambda row: (_id(row["id"]), str(row["name"])))
    # A repeated id is named by `lint_ids`; the last row of it counts, as it does in training.
    by_id = dict(sorted(named))
    label_of = {category_id: label for label, category_id in enumerate(by_id)}
    listed = image_rows.read(
        images,
        lambda row: (_id(row["id"]), str(row["file_name"]), float(row["height"]), float(row["width"])),
    )  # fmt: skip
    listed.sort(key=lambda row: row[0])
    ids = np.array([row[0] for row in listed], dtype=np.int64)
    position = {int(image_id): index for index, image_id in enumerate(ids)}
    counter = iter(range(1, len(annotations) + 1))

    def box(row: dict[str, Any]) -> tuple[Any, ...]:
        x, y, w, h = (_number(value) for value in row["bbox"])
        area = row.get("area")
        return (
            _id(row.get("id", next(counter))), position.get(int(row["image_id"]), NOWHERE),
            label_of.get(int(row["category_id"]), NOWHERE), x, y, w, h,
            math.nan if area is None else float(area), bool(row.get("iscrowd", 0)),
        )  # fmt: skip

    boxes = box_rows.read(annotations, box)
    table = np.array([row[1:] for row in boxes], dtype=np.float64).reshape(-1, 8)
    raw = RawAnnotations(
        name=name,
        image_ids=ids,
        file_names=[row[1] for row in listed],
        sizes_hw=np.array([row[2:] for row in listed], dtype=np.float64).reshape(-1, 2),
        category_ids=tuple(by_id),
        category_names=tuple(by_id.values()),
        annotation_ids=np.array([row[0] for row in boxes], dtype=np.int64),
        owners=table[:, 0].astype(np.int64),
        labels=table[:, 1].astype(np.int64),
        xywh=table[:, 2:6].copy(),
        area=table[:, 6].copy(),
        crowd=table[:, 7] != 0,
    )
    findings = [
        *image_rows.findings(where, "id, file_name, height, width"),
        *category_rows.findings(where, "id, name"),
        *box_rows.findings(where, "image_id, category_id, bbox: [x, y, width, height]"),
    ]
    repeated = len(named) - len(by_id)
    findings += finding(
        "error", "repeated-category-id", where, "category ids that stand twice", repeated,
        "number the categories anew",
    )  # fmt: skip
    return raw, findings


def _id(value: Any) -> int:
    """Raises TypeError, ValueError, OverflowError as `int`, also for what an int64 cannot hold."""
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError("an id beyond 64 bits")
    return number


def _number(value: Any) -> float:
    """Raises TypeError, ValueError as `float`, also for true and false."""
    if isinstance(value, bool):
        raise TypeError("a box of true and false")
    return float(value)
