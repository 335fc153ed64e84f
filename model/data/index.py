"""COCO annotations as flat arrays.

A json of 100,000 images becomes a dozen numpy arrays that all loader processes of a worker share
(a list of a million dicts would be sent to each).
Category ids of the file (sparse, any order) map to contiguous labels 0..K-1 by ascending id; the
map travels with every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.errors import DataError, nearest

XYXY_SHARE = 0.2  # of boxes that leave the image, from which on the format is in doubt
MIN_SIDE_PX = 1e-3


@dataclass(frozen=True)
class ClassMap:
    """Contiguous label k <-> category id of the annotation file <-> name."""

    category_ids: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.category_ids)

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"label": k, "category_id": i, "name": n}
            for k, (i, n) in enumerate(zip(self.category_ids, self.names, strict=True))
        ]

    @classmethod
    def from_json(cls, rows: Sequence[dict[str, Any]]) -> ClassMap:
        rows = sorted(rows, key=lambda row: int(row["label"]))
        return cls(
            tuple(int(row["category_id"]) for row in rows), tuple(str(row["name"]) for row in rows)
        )


@dataclass(frozen=True)
class CocoIndex:
    """Images in ascending id, boxes grouped by image.

    boxes_xyxy float32 [M, 4] pixels of the original image, clipped to it; labels int64 [M];
    crowd bool [M]; area float64 [M] as annotated; annotation_ids int64 [M];
    offsets int64 [N + 1]: the boxes of image i are offsets[i]:offsets[i + 1].
    counts: what was found and dropped, by kind, for the report.
    """

    name: str
    classes: ClassMap
    image_ids: NDArray[np.int64]
    file_names: NDArray[np.str_]
    sizes_hw: NDArray[np.int64]
    offsets: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    area: NDArray[np.float64]
    annotation_ids: NDArray[np.int64]
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getstate__(self) -> dict[str, Any]:
        """Arrays go as tensors, made once: torch's pickler for loader processes moves a tensor's
        bytes to shared memory instead of sending them. Any other pickler copies.
        """
        if "_tensors" not in self.__dict__:
            tensors = {
                name: torch.from_numpy(np.ascontiguousarray(value).view(np.uint8).reshape(-1))
                for name, value in self._arrays().items()
            }
            self.__dict__["_tensors"] = tensors
        layout = {name: (value.dtype.str, value.shape) for name, value in self._arrays().items()}
        rest = {key: value for key, value in self.__dict__.items() if key not in layout}
        return rest | {"_layout": layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        layout = state.pop("_layout")
        self.__dict__.update(state)
        for name, (dtype, shape) in layout.items():
            flat = state["_tensors"][name].numpy()
            self.__dict__[name] = flat.view(np.dtype(dtype)).reshape(shape)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {key: value for key, value in self.__dict__.items() if isinstance(value, np.ndarray)}

    def digest(self) -> str:
        """Of everything that training and evaluation see but the pixels; equal data, equal digest."""
        found = hashlib.sha256(repr((self.classes, self.file_names.tolist())).encode())
        for name, value in sorted(self._arrays().items()):
            if name != "file_names":
                found.update(name.encode() + np.ascontiguousarray(value).tobytes())
        return found.hexdigest()[:16]

    def training_boxes(self, image: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Boxes [m, 4] and labels [m] of one image without crowds (they are for evaluation)."""
        rows = slice(self.offsets[image], self.offsets[image + 1])
        real = ~self.crowd[rows]
        return self.boxes_xyxy[rows][real], self.labels[rows][real]

    def first(self, num_images: int) -> CocoIndex:
        """The images with the lowest ids."""
        stop = min(num_images, len(self))
        end = self.offsets[stop]
        kept = {
            name: getattr(self, name)[:end]
            for name in ("boxes_xyxy", "labels", "crowd", "area", "annotation_ids")
        }
        counts = _counts(self.offsets[: stop + 1], kept["crowd"], dropped={})
        return CocoIndex(
            self.name,
            self.classes,
            self.image_ids[:stop],
            self.file_names[:stop],
            self.sizes_hw[:stop],
            self.offsets[: stop + 1],
            counts=counts,
            **kept,
        )

    def ground_truth(self) -> dict[str, Any]:
        """Back to COCO's json structure with the labels as category ids, for the evaluator."""
        owner = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        x0, y0, x1, y1 = self.boxes_xyxy.astype(np.float64).T
        return {
            "info": {},
            "images": [
                {"id": int(i), "file_name": str(f), "height": int(h), "width": int(w)}
                for i, f, (h, w) in zip(self.image_ids, self.file_names, self.sizes_hw, strict=True)
            ],
            "categories": [
                {"id": label, "name": name} for label, name in enumerate(self.classes.names)
            ],
            "annotations": [
                {
                    "id": row + 1,  # pycocotools takes id 0 for "no match"
                    "image_id": int(self.image_ids[owner[row]]),
                    "category_id": int(self.labels[row]),
                    "bbox": [x0[row], y0[row], x1[row] - x0[row], y1[row] - y0[row]],
                    "area": float(self.area[row]),
                    "iscrowd": int(self.crowd[row]),
                }
                for row in range(len(self.labels))
            ],
        }


def parse_coco(text: bytes, name: str, keep_classes: Sequence[str] | None = None) -> CocoIndex:
    """Parse a COCO instances json.

    Boxes are clipped to their image; those without area are dropped and counted; crowds and images
    without boxes are kept and counted. keep_classes: names to keep, all others are left out.

    Raises:
        DataError: not json, not COCO, unknown class, ids that point nowhere, boxes given as xyxy.
    """
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(name, "a json file", str(error), "export the annotations again") from None
    if not isinstance(document, dict) or not all(
        isinstance(document.get(key), list) for key in ("images", "annotations", "categories")
    ):
        keys = ", ".join(document) if isinstance(document, dict) else type(document).__name__
        raise DataError(
            name,
            "COCO's lists images, annotations and categories",
            keys or "an empty object",
            "give the instances json of a COCO-format dataset",
        )
    try:
        return _index(document, name, keep_classes)
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # beyond 64 bits
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            name,
            "COCO's fields (images: id, file_name, height, width; annotations: image_id, "
            "category_id, bbox; categories: id, name)",
            what,
            "repair the entry",
        ) from None


def _index(document: dict[str, Any], name: str, keep_classes: Sequence[str] | None) -> CocoIndex:
    classes = _class_map(document["categories"], name, keep_classes)
    all_ids = {int(category["id"]) for category in document["categories"]}
    label_of = {category_id: label for label, category_id in enumerate(classes.category_ids)}

    images = sorted(document["images"], key=lambda image: int(image["id"]))
    image_ids = np.array([int(image["id"]) for image in images], dtype=np.int64)
    if len(np.unique(image_ids)) < len(images):
        repeated = image_ids[:-1][np.diff(image_ids) == 0][0]
        raise DataError(name, "unique image ids", f"id {repeated} twice", "number the images anew")
    sizes_hw = np.array(
        [(int(image["height"]), int(image["width"])) for image in images], dtype=np.int64
    ).reshape(-1, 2)
    position = {int(image_id): index for index, image_id in enumerate(image_ids)}

    owners: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    crowd: list[bool] = []
    areas: list[float] = []
    ids: list[int] = []
    other_classes = 0
    for annotation in document["annotations"]:
        category, image = int(annotation["category_id"]), int(annotation["image_id"])
        label_text = f"{name}, annotation {annotation.get('id', len(ids))}"
        if category not in all_ids:
            raise DataError(
                label_text, "a category id of the file", str(category), "add it to categories"
            )
        if image not in position:
            raise DataError(label_text, "an image id of the file", str(image), "add it to images")
        if category not in label_of:
            other_classes += 1
            continue
        x, y, w, h = (float(value) for value in annotation["bbox"])
        owners.append(position[image])
        boxes.append((x, y, w, h))
        labels.append(label_of[category])
        crowd.append(bool(annotation.get("iscrowd", 0)))
        areas.append(float(annotation.get("area", w * h)))
        ids.append(int(annotation.get("id", len(ids) + 1)))

    owner = np.array(owners, dtype=np.int64)
    xywh = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    _refuse_xyxy(xywh, sizes_hw[owner], name)
    if not np.isfinite(xywh).all():
        bad = int(np.flatnonzero(~np.isfinite(xywh).all(axis=1))[0])
        raise DataError(f"{name}, annotation {ids[bad]}", "finite numbers", str(boxes[bad]))

    limit = sizes_hw[owner][:, [1, 0]].astype(np.float64)
    low, high = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    clipped_low, clipped_high = np.clip(low, 0, limit), np.clip(high, 0, limit)
    moved = (np.abs(clipped_low - low) > 0.5).any(1) | (np.abs(clipped_high - high) > 0.5).any(1)
    has_area = ((clipped_high - clipped_low) > MIN_SIDE_PX).all(axis=1)

    order = np.flatnonzero(has_area)
    order = order[np.argsort(owner[order], kind="stable")]
    offsets = np.zeros(len(images) + 1, dtype=np.int64)
    np.cumsum(np.bincount(owner[order], minlength=len(images)), out=offsets[1:])
    crowd_array = np.array(crowd, dtype=np.bool_)[order]
    return CocoIndex(
        name=name,
        classes=classes,
        image_ids=image_ids,
        file_names=np.array([str(image["file_name"]) for image in images], dtype=np.str_),
        sizes_hw=sizes_hw,
        offsets=offsets,
        boxes_xyxy=np.concatenate([clipped_low, clipped_high], axis=1)[order].astype(np.float32),
        labels=np.array(labels, dtype=np.int64)[order],
        crowd=crowd_array,
        area=np.array(areas, dtype=np.float64)[order],
        annotation_ids=np.array(ids, dtype=np.int64)[order],
        counts=_counts(
            offsets,
            crowd_array,
            dropped={
                "boxes without area, dropped": int((~has_area).sum()),
                "boxes clipped to the image": int((moved & has_area).sum()),
                "boxes of other classes, dropped": other_classes,
            },
        ),
    )


def _counts(
    offsets: NDArray[np.int64], crowd: NDArray[np.bool_], dropped: dict[str, int]
) -> dict[str, int]:
    found = {
        "images": len(offsets) - 1,
        "boxes": int((~crowd).sum()),
        "crowds, for evaluation only": int(crowd.sum()),
        "images without boxes": int((np.diff(offsets) == 0).sum()),
    }
    return found | {kind: number for kind, number in dropped.items() if number}


def _class_map(
    categories: list[dict[str, Any]], name: str, keep_classes: Sequence[str] | None
) -> ClassMap:
    by_id = {int(category["id"]): str(category["name"]) for category in categories}
    if len(by_id) < len(categories):
        raise DataError(name, "unique category ids", "a repeated one", "number them anew")
    if keep_classes:
        for wanted in keep_classes:
            if wanted not in by_id.values():
                raise DataError(
                    "data.classes",
                    f"a class of {name}",
                    repr(wanted),
                    nearest(wanted, by_id.values()),
                )
        by_id = {i: n for i, n in by_id.items() if n in set(keep_classes)}
    if not by_id:
        raise DataError(name, "at least one category", "none", "add categories")
    ids = tuple(sorted(by_id))
    return ClassMap(ids, tuple(by_id[i] for i in ids))


def _refuse_xyxy(xywh: NDArray[np.float64], sizes_hw: NDArray[np.int64], name: str) -> None:
    """COCO boxes are x, y, width, height; x1, y1, x2, y2 would train on nonsense in silence."""
    if not len(xywh):
        return
    limit = sizes_hw[:, [1, 0]] + 1.0
    leaves = (xywh[:, :2] + xywh[:, 2:] > limit).any(axis=1)
    would_fit = (xywh[:, 2:] > xywh[:, :2]) & (xywh[:, 2:] <= limit)
    if leaves.mean() >= XYXY_SHARE and would_fit.all(axis=1).mean() > 0.98:
        raise DataError(
            name,
            "boxes as [x, y, width, height]",
            f"what looks like [x1, y1, x2, y2] ({leaves.mean():.0%} of boxes leave their image)",
            "write width and height: x2 - x1, y2 - y1",
        )
