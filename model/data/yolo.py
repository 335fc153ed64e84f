"""YOLO: a text file an image, a line an object: class, centre, width, height as shares of the image.

A line with more numbers is an outline x y x y …, whose box is taken; with keypoints, the numbers after
the box are left out. An image without a text file, or with an empty one, has no objects. The text
file of …/images/a/b.jpg is …/labels/a/b.txt: the last folder called images is exchanged.
Source: the format's description by its makers (Ultralytics, "Detection datasets").
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.data.converted import (
    Complaints,
    ConvertedBox,
    ConvertedImage,
    ConvertedSplit,
    in_threads,
    shown_size,
)
from model.data.image_lint import SUFFIXES
from model.errors import DataError

SLACK = 0.01  # of the image; tools round, and boxes at the edge leave it by a pixel
MOST_LINES = 100_000  # of one text file: more is no annotation


def read_images(
    entries: Sequence[Path], base: Path, names: Sequence[str], num_keypoint_values: int = 0
) -> ConvertedSplit:
    """All images below folders, or of lists of images, with their labels.

    entries: folders, images or .txt lists, whose relative lines are looked for from `base`;
    num_keypoint_values: numbers after each box.

    Raises:
        DataError: no images, one that cannot be read, or one outside `base`.
    """
    files = list(dict.fromkeys(file for entry in entries for file in _files(entry, base)))
    if not files:
        shown = ", ".join(str(entry) for entry in entries)
        raise DataError(shown, "images", "none", "correct train and val in the data.yaml")
    complaints = Complaints()

    def read(file: Path) -> ConvertedImage:
        return _read_image(file, base, names, num_keypoint_values, complaints)

    images = in_threads(read, files)
    ordered = sorted(complaints.found, key=lambda one: one.where)
    return ConvertedSplit(tuple(images), tuple(ordered))


def _files(entry: Path, base: Path) -> Iterator[Path]:
    if entry.is_dir():
        found = (path for path in _below(entry) if path.suffix.lower() in SUFFIXES)
        yield from sorted(path for path in found if path.is_file())
    elif entry.suffix.lower() in SUFFIXES and entry.is_file():
        yield entry
    elif entry.is_file():
        for number, line in enumerate(entry.read_text(errors="replace").splitlines(), start=1):
            if line.strip():
                yield inside(base / line.strip(), base, f"{entry}:{number}")
    else:
        raise DataError(str(entry), "a folder of images or a list of them", "nothing", "correct the data.yaml")  # fmt: skip


def _below(folder: Path) -> Iterator[Path]:
    """All files, also those in linked folders, each folder once: links may lead in a circle."""
    seen = set[str]()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(root, name) for name in names)


def inside(path: Path, base: Path, where: str) -> Path:
    """`path` without . and .., as it is written: links may lead elsewhere.

    Raises:
        DataError: it leads out of the dataset.
    """
    plain = Path(os.path.normpath(path))
    # A relative path may begin with "..", which is "relative to ." by its letters.
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(base)):
        raise DataError(where, f"a place below {base}", str(plain), "give its path from there")
    return plain


def labels_of(file: Path) -> Path:
    """The text file of an image."""
    parts = list(file.with_suffix(".txt").parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            return Path(*parts)
    return Path(*parts)  # without such a folder they lie beside the images


def _read_image(
    file: Path, base: Path, names: Sequence[str], num_keypoint_values: int, complaints: Complaints
) -> ConvertedImage:
    width, height = shown_size(file)
    path = labels_of(file)
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ConvertedImage(file, width, height, (), annotated=False)
    except OSError as error:
        raise DataError(
            str(path), "a text file", error.strerror or str(error), "repair it"
        ) from None
    if len(lines) > MOST_LINES:
        raise DataError(
            str(path), f"at most {MOST_LINES:,} lines", f"{len(lines):,}", "is it a label file?"
        )
    name = str(path.relative_to(base)) if path.is_relative_to(base) else str(path)
    boxes = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                label, box = parse_line(line, len(names), num_keypoint_values)
            except ValueError as error:
                expected, _, got = str(error).partition("|")
                complaints.add(f"{name}:{number}", expected, got)
                continue
            x, y, w, h = box
            boxes.append(ConvertedBox(names[label], (x * width, y * height, w * width, h * height)))
    return ConvertedImage(file, width, height, tuple(boxes))


def parse_line(
    line: str, num_classes: int, num_keypoint_values: int = 0
) -> tuple[int, tuple[float, float, float, float]]:
    """A label's line -> (class, x, y, width, height from the upper left corner, as shares).

    Raises:
        ValueError: "expected|got".
    """
    shown = " ".join(line.split())[:60]
    try:
        first, *values = (float(word) for word in line.split())
    except ValueError:
        raise ValueError(f"numbers|{shown!r}") from None
    if not first.is_integer() or not 0 <= first < num_classes:
        raise ValueError(f"a class 0..{num_classes - 1}|{line.split()[0]}")
    if num_keypoint_values:
        if len(values) != 4 + num_keypoint_values:
            raise ValueError(
                f"{5 + num_keypoint_values} numbers, as kpt_shape says|{len(values) + 1}"
            )
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise ValueError(
            f"class x y width height, or class x y x y x y …|{len(values) + 1} numbers: {shown!r}"
        )
    if not all(math.isfinite(value) and -SLACK <= value <= 1 + SLACK for value in values):
        raise ValueError(f"shares of the image, 0..1|{shown!r}")
    if len(values) == 4:
        x, y, w, h = values
        left, top, right, bottom = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    else:
        xs, ys = values[::2], values[1::2]
        left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    left, top, right, bottom = (min(max(edge, 0.0), 1.0) for edge in (left, top, right, bottom))
    if right <= left or bottom <= top:
        raise ValueError(f"a box with width and height inside the image|{shown!r}")
    return int(first), (left, top, right - left, bottom - top)
