"""Pascal VOC: one XML file an image, lists of images for each split.

Corners are pixels counted from 1, both inside the box: xmin 1, xmax 10 is ten pixels wide and begins
at 0. Objects marked difficult are not scored in VOC either: they become crowds, which training leaves
out and evaluation neither counts as found nor as missed.
Source: the VOC2012 development kit, §4 (annotation) and §5 (image sets).
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

from model.data.converted import (
    Complaints,
    ConvertedBox,
    ConvertedImage,
    ConvertedSplit,
    in_threads,
    safe_name,
    shown_size,
)
from model.errors import DataError, nearest

SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp", ".webp")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
TRAIN_SETS, VAL_SETS = ("train", "trainval"), ("val", "test")


class Tree:
    """An XML document with the line of each element. Document types are refused: they can make a
    small file expand to any size, or read other files.
    """

    def __init__(self, data: bytes, name: str) -> None:
        """Raises DataError: not XML, or with a document type."""
        self.name, self.lines = name, dict[ET.Element, int]()
        self._builder = ET.TreeBuilder()
        self._parser = expat.ParserCreate()
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._builder.end
        self._parser.CharacterDataHandler = self._builder.data
        self._parser.StartDoctypeDeclHandler = self._refuse
        try:
            self._parser.Parse(data, True)
            self.root = self._builder.close()
        except (
            expat.ExpatError,
            LookupError,
            ValueError,
        ) as error:  # an encoding that is not known
            line = getattr(error, "lineno", 1)
            raise DataError(f"{name}:{line}", "XML", str(error), "repair it") from None

    def where(self, element: ET.Element) -> str:
        return f"{self.name}:{self.lines[element]}"

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self.lines[self._builder.start(tag, attributes)] = self._parser.CurrentLineNumber

    def _refuse(self, *_: object) -> NoReturn:
        raise DataError(
            f"{self.name}:{self._parser.CurrentLineNumber}", "XML without a document type", "<!DOCTYPE",
            "take it out",
        )  # fmt: skip


def find_sets(source: Path, train: str | None, val: str | None) -> tuple[str, str | None]:
    """Names of the image sets for training and validation; as given, or the usual ones.

    Raises:
        DataError: not a VOC folder, or without such a set.
    """
    folder = source / "ImageSets" / "Main"
    for needed in (source / "Annotations", source / "JPEGImages", folder):
        if not needed.is_dir():
            inside = sorted(path.parent.name for path in source.glob("*/Annotations"))
            remedy = (
                f"give {source / inside[0]}"
                if inside
                else "give the folder that holds Annotations/"
            )
            raise DataError("SOURCE", f"a folder {needed.relative_to(source)}/", f"none in {source}", remedy)  # fmt: skip
    there = sorted(path.stem for path in folder.glob("*.txt"))
    for given in (train, val):
        if given is not None and safe_name(given, "image set") not in there:
            raise DataError("image set", f"{given}.txt in {folder}", "none", nearest(given, there))
    train = train or next((name for name in TRAIN_SETS if name in there), None)
    if train is None:
        raise DataError("image set", f"train.txt or trainval.txt in {folder}", "none", nearest("train", there))  # fmt: skip
    others = VAL_SETS if train != "trainval" else ("test",)
    return train, val or next((name for name in others if name in there), None)


def read_set(source: Path, name: str) -> ConvertedSplit:
    """All images of an image set.

    Raises:
        DataError: an image or its annotation is missing, is no XML, or leads out of the folder.
    """
    path = source / "ImageSets" / "Main" / f"{name}.txt"
    stems = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        if line.strip():  # of a class's own list the second word says whether it is there
            stems.append(safe_name(line.split()[0], f"{path}:{number}"))
    complaints = Complaints()
    images = in_threads(lambda stem: _read_image(source, stem, complaints), dict.fromkeys(stems))
    if not images:
        raise DataError(str(path), "at least one image", "none", "choose another image set")
    ordered = sorted(complaints.found, key=lambda one: one.where)
    return ConvertedSplit(tuple(images), tuple(ordered))


def _read_image(source: Path, stem: str, complaints: Complaints) -> ConvertedImage:
    path = source / "Annotations" / f"{stem}.xml"
    name = str(path.relative_to(source))
    try:
        tree = Tree(path.read_bytes(), name)
    except OSError as error:
        raise DataError(
            name, "an annotation file", error.strerror or str(error), "add it, or take the image out of the set"
        ) from None  # fmt: skip
    file = _find_image(source, stem, tree)
    width, height = _size(tree, file)
    boxes = [box for one in tree.root.findall("object") if (box := _box(tree, one, complaints))]
    return ConvertedImage(file, width, height, tuple(boxes))


def _find_image(source: Path, stem: str, tree: Tree) -> Path:
    """The file of the same name; else the one that the annotation names."""
    folder = source / "JPEGImages"
    for suffix in SUFFIXES:
        file = folder / f"{stem}{suffix}"
        if file.is_file():
            return file
    named = (tree.root.findtext("filename") or "").strip()
    if named and (folder / safe_name(named, tree.name)).is_file():
        return folder / named
    raise DataError(
        tree.name, f"an image {stem}.jpg in JPEGImages", "none", "add it, or take it out of the set"
    )


def _size(tree: Tree, file: Path) -> tuple[int, int]:
    """As annotated; where no size is, as the image says."""
    size = tree.root.find("size")
    try:
        width, height = (int(float((size.findtext(k) if size is not None else None) or 0)) for k in ("width", "height"))  # fmt: skip
    except (ValueError, OverflowError):  # int() of 1e999
        assert size is not None
        raise DataError(tree.where(size), "width and height in pixels", "no numbers", "repair it") from None  # fmt: skip
    return (width, height) if width > 0 and height > 0 else shown_size(file)


def _box(tree: Tree, element: ET.Element, complaints: Complaints) -> ConvertedBox | None:
    where = tree.where(element)
    name = (element.findtext("name") or "").strip()
    bounds = element.find("bndbox")
    if not name or bounds is None:
        complaints.add(
            where, "an object with name and bndbox", "none of it" if not name else "no bndbox"
        )
        return None
    texts = [(bounds.findtext(corner) or "").strip() for corner in CORNERS]
    try:
        x0, y0, x1, y1 = (float(text) for text in texts)
    except ValueError:
        x0 = y0 = x1 = y1 = math.nan
    if not (math.isfinite(x0 + y0) and x1 >= x0 and y1 >= y0):
        complaints.add(tree.where(bounds), "xmin <= xmax and ymin <= ymax", ", ".join(texts))
        return None
    ignored = (element.findtext("difficult") or "0").strip() in ("1", "true", "True")
    return ConvertedBox(name, (x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1), ignored)


def class_names(splits: Sequence[ConvertedSplit]) -> list[str]:
    """Those that occur, by name: VOC keeps no list of them."""
    return sorted({box.class_name for split in splits for image in split.images for box in image.boxes})  # fmt: skip
