"""A COCO-format dataset of the tests, written as other tools write theirs."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any


def _splits(dataset: Path) -> dict[str, tuple[list[dict[str, Any]], list[str], dict[int, Any]]]:
    """(images, names of the classes, annotations by image) of each split."""
    found = {}
    for split in ("train", "val"):
        (path,) = (dataset / "annotations").glob(f"*{split}*.json")
        document = json.loads(path.read_text())
        names = [category["name"] for category in document["categories"]]
        label = {category["id"]: i for i, category in enumerate(document["categories"])}
        boxes: dict[int, Any] = defaultdict(list)
        for one in document["annotations"]:
            boxes[one["image_id"]].append((label[one["category_id"]], one["bbox"]))
        found[split] = document["images"], names, boxes
    return found


def as_voc(dataset: Path, folder: Path) -> None:
    """Pascal VOC: an XML for each picture, boxes as corners from 1."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for split, (images, names, boxes) in _splits(dataset).items():
        stems = []
        for image in images:
            stem = f"{split}_{Path(image['file_name']).stem}"
            stems.append(stem)
            shutil.copy(
                dataset / "images" / split / image["file_name"],
                folder / "JPEGImages" / f"{stem}.jpg",
            )
            objects = "".join(
                f"<object><name>{names[label]}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>"
                f"<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
                for label, (x, y, w, h) in boxes[image["id"]]
            )
            size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
            (folder / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><filename>{stem}.jpg</filename>{size}{objects}</annotation>"
            )
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")


def as_yolo(dataset: Path, folder: Path) -> None:
    """YOLO: a text for each picture, centres and sizes as shares of its sides."""
    for split, (images, names, boxes) in _splits(dataset).items():
        for name in ("images", "labels"):
            (folder / name / split).mkdir(parents=True)
        for image in images:
            shutil.copy(dataset / "images" / split / image["file_name"], folder / "images" / split)
            width, height = image["width"], image["height"]
            lines = [
                f"{label} {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} {h / height:.6f}"
                for label, (x, y, w, h) in boxes[image["id"]]
            ]
            path = folder / "labels" / split / f"{Path(image['file_name']).stem}.txt"
            path.write_text("\n".join(lines))
        listed = "\n".join(f"  {i}: {name}" for i, name in enumerate(names))
        (folder / "data.yaml").write_text(
            f"path: .\ntrain: images/train\nval: images/val\nnames:\n{listed}\n"
        )
