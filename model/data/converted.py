"""Datasets of other formats on their way to COCO's: images, boxes, and what could not be read.

The readers of each format (`voc.py`, `yolo.py`) make a `ConvertedSplit`; here it becomes a document.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from PIL import Image

from model.data.image_lint import EXIF_ORIENTATION
from model.errors import DataError

READERS = 4
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class ConvertedBox:
    """xywh: pixels of the image as it is shown, from its upper left corner. ignore: not scored."""

    class_name: str
    xywh: tuple[float, float, float, float]
    ignore: bool = False


@dataclass(frozen=True)
class ConvertedImage:
    """file: where it lies now; annotated: whether there is an annotation file for it."""

    file: Path
    width: int
    height: int
    boxes: tuple[ConvertedBox, ...]
    annotated: bool = True


@dataclass(frozen=True)
class ConvertedSplit:
    """malformed: one line for each annotation that could not be read and was left out."""

    images: tuple[ConvertedImage, ...]
    malformed: tuple[DataError, ...] = ()


@dataclass
class Complaints:
    """Collects what is malformed, so that all of it is known before anything is decided."""

    found: list[DataError] = field(default_factory=list)

    def add(self, where: str, expected: str, got: str) -> None:
        self.found.append(DataError(where, expected, got, "repair it"))


def refuse_malformed(malformed: Sequence[DataError]) -> None:
    """Raises DataError: the first, with the number of all."""
    if malformed:
        first = malformed[0]
        others = f" ({len(malformed)} like it)" if len(malformed) > 1 else ""
        raise DataError(
            first.where, first.expected, first.got,
            f"repair it{others}, or --skip-malformed leaves such objects out",
        )  # fmt: skip


def document(split: ConvertedSplit, names: Sequence[str], root: Path) -> dict[str, Any]:
    """COCO's instances json; file names relative to `root`, ids from 1 in the order given."""
    number_of = {name: number for number, name in enumerate(names, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(split.images, start=1):
        images.append({
            "id": number, "file_name": relative(image.file, root), "width": image.width,
            "height": image.height,
        })  # fmt: skip
        for box in image.boxes:
            values = [round(value, 3) for value in box.xywh]
            annotations.append({
                "id": len(annotations) + 1, "image_id": number,
                "category_id": number_of[box.class_name], "bbox": values,
                "area": round(values[2] * values[3], 3), "iscrowd": int(box.ignore),
            })  # fmt: skip
    categories = [{"id": number, "name": name} for name, number in number_of.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def relative(file: Path, root: Path) -> str:
    return PurePosixPath(os.path.relpath(file, root)).as_posix()


def common_folder(splits: Iterable[ConvertedSplit]) -> Path:
    """The deepest folder that holds all images."""
    folders = {str(image.file.parent) for split in splits for image in split.images}
    return Path(os.path.commonpath(folders))


def safe_name(name: str, where: str) -> str:
    """A name that stays inside the folder it is looked for in.

    Raises:
        DataError: absolute, or with .., a backslash or a NUL.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or set(name) & {"\\", "\0"}:
        raise DataError(where, "a name inside the dataset", repr(name), "give the file's own name")
    return name


def shown_size(file: Path) -> tuple[int, int]:
    """(width, height) as a viewer shows it, from the header alone.

    Raises:
        DataError: missing, or not an image.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            sideways = image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
    except FileNotFoundError:
        raise DataError(f"image {file}", "a file", "none", "add it, or take it out") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = "not an image" if "cannot identify" in str(error) else str(error)
        raise DataError(
            f"image {file}", "a readable image", why, "replace it or take it out"
        ) from None
    return (height, width) if sideways else (width, height)


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Many small files wait for the disk side by side; in order."""
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        return list(pool.map(work, items))
