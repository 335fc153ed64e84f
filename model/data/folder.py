"""Finding a COCO-format dataset in a folder, and reading its images.

Usual layouts: `annotations/*train*.json` and `*val*.json` (or the same at the top), images in
`train2017/`, `images/train2017/`, `images/`, `train/`, … or beside the json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.data.index import CocoIndex
from model.errors import DataError


@dataclass(frozen=True)
class SplitPaths:
    """Annotation file and image folder of one split."""

    annotations: Path
    images: Path


class FolderReader:
    """`read(name)` from a local folder; picklable, for loader workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def read_file(path: Path) -> bytes:
    return path.read_bytes()


def find_split(
    folder: Path, split: str, read: Callable[[Path], bytes] = read_file
) -> SplitPaths | None:
    """Annotations and images of `split` ("train" or "val"), or None if there are no annotations.

    read: gives an annotation file's content, where it is not to be fetched anew.

    Raises:
        DataError: no such folder; annotations without their images; several candidates.
    """
    if not folder.is_dir():
        raise DataError(
            "data.root", "a folder", f"none at {folder}", "give the dataset's folder by --data"
        )
    names = {"train": ("train",), "val": ("val", "test")}[split]
    places = [folder / "annotations", folder]
    for name in names:
        for place in places:
            found = sorted(place.glob(f"*{name}*.json"))
            instances = [path for path in found if path.name.startswith("instances")]
            found = instances or found
            if len(found) > 1:
                raise DataError(
                    f"data.{split}.annotations",
                    f"one *{name}*.json in {place}",
                    ", ".join(path.name for path in found),
                    f"choose one: --set data.{split}.annotations=PATH",
                )
            if found:
                return SplitPaths(found[0], find_images(folder, found[0], name, split, read))
    return None


def find_images(
    folder: Path,
    annotations: Path,
    name: str,
    split: str,
    read: Callable[[Path], bytes] = read_file,
) -> Path:
    """The folder that holds the images of an annotation file: the first that has the first image."""
    stem = annotations.stem.removeprefix("instances_")
    places = [
        folder / "images" / stem,
        folder / stem,
        folder / "images" / name,
        folder / name,
        folder / name / "images",
        folder / "images",
        folder / "JPEGImages",
        folder,
        annotations.parent,
    ]
    wanted = _first_file_name(read(annotations))
    for place in places:
        if place.is_dir() and (wanted is None or (place / wanted).is_file()):
            return place
    raise DataError(
        f"data.{split}.images",
        f"{wanted} of {annotations.name} in one of {', '.join(_short(folder, p) for p in places)}",
        "none there",
        f"name the folder: --set data.{split}.images=FOLDER",
    )


FIRST_NAME = re.compile(rb'"images"\s*:\s*\[\s*\{[^{}\[\]]*?"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')


def _first_file_name(annotations: bytes) -> str | None:
    """`file_name` of the first image, without judging the rest of the file.

    Reading all of a large file for one name would take as long as reading it for good.
    """
    try:
        if found := FIRST_NAME.search(annotations):
            return str(json.loads(found[1]))
        images = json.loads(annotations).get("images") or []
        return str(images[0]["file_name"]) if images else None
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        return None  # the parser that follows says what is wrong


def _short(folder: Path, place: Path) -> str:
    inside = place.relative_to(folder) if place.is_relative_to(folder) else place
    return f"{inside}/"


def missing_images(index: CocoIndex, folder: Path) -> list[str]:
    """File names of the index that the folder lacks. One listing, not one question an image."""
    wanted = [str(name) for name in index.file_names]
    if any("/" in name for name in wanted):
        return [name for name in wanted if not (folder / name).is_file()]
    present = {entry.name for entry in folder.iterdir()}
    return [name for name in wanted if name not in present]
