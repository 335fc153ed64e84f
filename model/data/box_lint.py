"""Mistakes in annotations that the json alone shows: ids, boxes and the format they are written in.

Shape legend: N images, M boxes.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from model.data.annotations import RawAnnotations
from model.data.findings import EXAMPLES, Finding, Severity, finding, has_errors
from model.data.index import MIN_SIDE_PX, XYXY_SHARE

SLACK_PX = 1.0  # rounding, and tools that count the last pixel
FITS_SHARE = 0.98  # of boxes that would be well as another format
PART_SHARE = (
    0.8  # the same of those that leave their image far, where it is only a part of the file
)
SUSPECT_SHARE = 0.02  # of boxes that leave their image, from which on another format is thought of
AREA_SHARE = 0.9  # of boxes whose area says that they are xyxy
LEAST_BOXES = 10  # fewer say nothing about a format
MANY_TINY_SHARE = 0.05
MOST_DETECTIONS = 100  # COCO's, an image
XYXY_REMEDY = "write width and height: x2 - x1, y2 - y1"


def lint_ids(raw: RawAnnotations, where: str) -> list[Finding]:
    """Ids that stand twice or point nowhere, names that stand twice or lead elsewhere."""
    image_ids, counts = np.unique(raw.image_ids, return_counts=True)
    repeated = [f"id {i}" for i in image_ids[counts > 1]]
    box_ids, box_counts = np.unique(raw.annotation_ids, return_counts=True)
    repeated_boxes = [f"id {i}" for i in box_ids[box_counts > 1]]
    files = [name for name, number in Counter(raw.file_names).items() if number > 1]
    classes = [name for name, number in Counter(raw.category_names).items() if number > 1]
    bad_size = ~(np.isfinite(raw.sizes_hw) & (raw.sizes_hw >= 1)).all(axis=1)
    return [
        *finding("error", "repeated-image-id", where, "image ids that stand twice", repeated,
                 "number the images anew"),
        *finding("warning", "repeated-annotation-id", where, "annotation ids that stand twice",
                 repeated_boxes, "number the annotations anew; other tools drop all but one"),
        *_rows(raw, raw.owners < 0, "error", "unknown-image", where,
               "boxes of an image that is not in the file", "add it to images, or drop the boxes"),
        *_rows(raw, raw.labels == -1, "error", "unknown-category", where,
               "boxes of a category that is not in the file", "add it to categories"),
        *finding("warning", "repeated-file-name", where, "files that are listed as several images",
                 files, "keep one entry, with the boxes of all"),
        *finding("warning", "repeated-class-name", where, "classes that share a name", classes,
                 "merge them, or tell them apart"),
        *finding("error", "file-name-leaves", where, "file names that lead out of the image folder",
                 [name for name in raw.file_names if _leaves(name)], "give names inside the folder"),
        *finding("error", "image-size", where, "images without a size of at least 1 x 1 pixel",
                 [raw.file_names[i] for i in np.flatnonzero(bad_size)],
                 "write width and height in pixels"),
        *([] if len(raw) else finding("error", "no-images", where, "the file lists no image", 1,
                                      "add images")),
        *([] if raw.category_ids else finding("error", "no-categories", where,
                                              "the file lists no category", 1, "add categories")),
    ]  # fmt: skip


def lint_boxes(
    raw: RawAnnotations, where: str, *, image_size_px: int, tiny_px: float
) -> list[Finding]:
    """Boxes that are lost or look wrong. tiny_px: a shorter side is tiny, in the image and in the
    network's view of `image_size_px`.
    """
    known = raw.owners >= 0
    broken = np.logical_not(np.isfinite(raw.xywh).all(axis=1))
    findings = _rows(raw, broken, "error", "not-finite", where,
                     "boxes with a value that is no number", "write x, y, width, height")  # fmt: skip
    fine = known & ~broken
    fine[fine] &= np.isfinite(raw.sizes_hw[raw.owners[fine]]).all(axis=1)
    if not fine.any():
        return findings
    formats = lint_format(raw, fine, where)
    findings += formats
    if has_errors(formats):  # whatever else is seen now is a consequence
        return findings
    x, y, w, h = raw.xywh.T
    clipped = raw.corners()
    sides = clipped[:, 2:] - clipped[:, :2]
    flat = fine & ((w <= 0) | (h <= 0))
    outside = fine & ~flat & (sides <= MIN_SIDE_PX).any(axis=1)
    moved = np.abs(clipped - np.stack([x, y, x + w, y + h], axis=1)) > SLACK_PX
    partly = fine & ~flat & ~outside & moved.any(axis=1)
    left = fine & ~flat & ~outside
    findings += [
        *_rows(raw, flat, "warning", "degenerate", where, "boxes without width or height",
               "they are dropped in training; annotate them again or take them out"),
        *_rows(raw, outside, "warning", "outside", where, "boxes wholly outside their image",
               "they are dropped in training; is it the right image?"),
        *_rows(raw, partly, "note", "leaves-image", where, "boxes that leave their image by more "
               "than a pixel", "they are clipped to it"),
    ]  # fmt: skip
    return findings + _tiny(raw, left, sides, where, image_size_px, tiny_px) + _crowding(raw, left, where)  # fmt: skip


def lint_format(raw: RawAnnotations, fine: NDArray[np.bool_], where: str) -> list[Finding]:
    """Boxes that are no [x, y, width, height] in pixels. fine [M]: numbers, of a known image.

    One box says nothing: [30, 20, 70, 50] is both a box and two corners. All of them do. Of x, y,
    w, h in an image w x h lies inside and w > x only for some; of two corners w > x for all, and in
    most images x + w lies outside. Where few boxes leave, the annotated areas may tell.
    """
    rows = np.flatnonzero(fine)
    x, y, w, h = raw.xywh[rows].T
    height, width = raw.sizes_hw[raw.owners[rows]].T
    normal = (
        (raw.xywh[rows] <= 1.5).all(axis=1) & (w > 0) & (h > 0) & (np.minimum(width, height) > 8)
    )
    if normal.mean() >= 0.5:
        return _rows(raw, rows[normal], "error", "normalised", where,
                     "boxes with all values below 1.5: shares of the image, not pixels",
                     "multiply x and width by the image's width, y and height by its height")  # fmt: skip
    leaves = (x + w > width + SLACK_PX) | (y + h > height + SLACK_PX)
    corners = (w > x) & (h > y) & (w <= width + SLACK_PX) & (h <= height + SLACK_PX)
    share, fits = float(leaves.mean()), float(corners.mean())
    by_area = _area_says_corners(raw, rows)
    if (share >= XYXY_SHARE and fits > FITS_SHARE) or by_area > AREA_SHARE:
        proof = f"{by_area:.0%} have the area of one" if by_area > AREA_SHARE else f"{share:.0%} would leave their image"  # fmt: skip
        return _rows(raw, rows[corners], "error", "xyxy", where,
                     f"boxes that look like [x1, y1, x2, y2] ({proof})", XYXY_REMEDY)  # fmt: skip
    if len(rows) < LEAST_BOXES or share < SUSPECT_SHARE:
        return _part_corners(raw, rows, corners, where)
    if fits > FITS_SHARE:
        return _rows(raw, rows[corners], "warning", "xyxy", where,
                     f"boxes that may be [x1, y1, x2, y2] ({share:.0%} would leave their image)",
                     f"look at some; {XYXY_REMEDY}")  # fmt: skip
    return _centres(raw, rows, leaves, where) or _part_corners(raw, rows, corners, where)


def _centres(
    raw: RawAnnotations, rows: NDArray[np.int64], leaves: NDArray[np.bool_], where: str
) -> list[Finding]:
    """Of centres none leaves to the left or above, and all would fit as such."""
    x, y, w, h = raw.xywh[rows].T
    height, width = raw.sizes_hw[raw.owners[rows]].T
    fits = (x >= w / 2 - SLACK_PX) & (y >= h / 2 - SLACK_PX)
    fits &= (x + w / 2 <= width + SLACK_PX) & (y + h / 2 <= height + SLACK_PX)
    before = ((x < -SLACK_PX) | (y < -SLACK_PX)).mean()
    if fits.mean() <= FITS_SHARE or before >= leaves.mean() / 10:
        return []
    severity: Severity = "error" if leaves.mean() >= XYXY_SHARE else "warning"
    return _rows(raw, rows[leaves], severity, "centred", where,
                 "boxes that leave their image, none to the left or above: x, y look like the centre "
                 f"({fits.mean():.0%} would fit)",
                 "write the upper left corner: x - width / 2, y - height / 2")  # fmt: skip


def _part_corners(
    raw: RawAnnotations, rows: NDArray[np.int64], corners: NDArray[np.bool_], where: str
) -> list[Finding]:
    """Some of the file in another format, as two sources merged into one give.

    Only boxes that leave by a tenth of the image count: tools that do not clip leave by less.
    """
    x, y, w, h = raw.xywh[rows].T
    height, width = raw.sizes_hw[raw.owners[rows]].T
    far = (x + w > 1.1 * width) | (y + h > 1.1 * height)
    odd = rows[far & corners]
    if len(odd) < LEAST_BOXES or len(odd) < PART_SHARE * far.sum():
        return []
    return _rows(raw, odd, "warning", "xyxy", where,
                 "boxes that leave their image far and would fit it as [x1, y1, x2, y2]",
                 f"was a part of the file exported differently? {XYXY_REMEDY}")  # fmt: skip


def _area_says_corners(raw: RawAnnotations, rows: NDArray[np.int64]) -> float:
    """Share of boxes whose `area` is that of x1, y1, x2, y2 and not of x, y, width, height."""
    x, y, w, h = raw.xywh[rows].T
    area = raw.area[rows]
    told = np.isfinite(area) & (area > 0)
    if told.sum() < LEAST_BOXES:
        return 0.0
    as_corners, as_sides = (w - x) * (h - y), w * h
    near = np.abs(area - as_corners) <= 0.02 * np.abs(as_corners)
    far = np.abs(area - as_sides) > 0.05 * np.abs(as_sides)
    return float((near & far & (w > x) & (h > y))[told].mean())


def _tiny(
    raw: RawAnnotations, rows: NDArray[np.bool_], sides: NDArray[np.float64], where: str,
    image_size_px: int, tiny_px: float,
) -> list[Finding]:  # fmt: skip
    shorter = sides.min(axis=1)
    longest = np.ones(len(shorter))
    longest[rows] = raw.sizes_hw[raw.owners[rows]].max(axis=1)
    real = rows & ~raw.crowd
    here = real & (shorter < tiny_px)
    seen = real & (shorter * image_size_px / longest < tiny_px) & ~here
    total = max(1, int(real.sum()))
    found = []
    for tiny, kind, what, remedy in (
        (here, "tiny", f"boxes with a side below {tiny_px:g} px in the image",
         "are they slips of the mouse? take those out"),
        (seen, "tiny-scaled", f"boxes with a side below {tiny_px:g} px once the image is scaled to "
         f"{image_size_px} px", "a larger --image-size keeps them, or cut the images into tiles"),
    ):  # fmt: skip
        share = float(tiny.sum()) / total
        severity: Severity = "warning" if share > MANY_TINY_SHARE else "note"
        found += _rows(raw, tiny, severity, kind, where, f"{what} ({share:.1%})", remedy)
    return found


def _crowding(raw: RawAnnotations, rows: NDArray[np.bool_], where: str) -> list[Finding]:
    """Boxes that stand twice, images with too many, images with none."""
    chosen = np.flatnonzero(rows)
    keys = np.concatenate(
        [raw.owners[chosen, None], raw.xywh[chosen].round(2), raw.labels[chosen, None]], axis=1
    )
    twice = chosen[_repeated(keys)]
    other = np.setdiff1d(chosen[_repeated(keys[:, :5])], twice)
    number = np.bincount(raw.owners[chosen], minlength=len(raw))
    crowded = [raw.file_names[i] for i in np.flatnonzero(number > MOST_DETECTIONS)]
    return [
        *_rows(raw, twice, "warning", "repeated-box", where, "boxes that repeat one of their image "
               "and class", "keep one of each"),
        *_rows(raw, other, "note", "two-classes", where, "boxes that repeat one of another class",
               "keep the right class, unless both are meant"),
        *finding("note", "crowded", where, f"images with more than {MOST_DETECTIONS} boxes", crowded,
                 f"at most {MOST_DETECTIONS} detections an image are scored; cut them into tiles"),
    ]  # fmt: skip


def _repeated(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    """Positions of rows [n, k] that equal an earlier one."""
    order = np.lexsort(rows.T[::-1])
    same = (np.diff(rows[order], axis=0) == 0).all(axis=1)
    return np.sort(order[1:][same])


def lint_empty(raw: RawAnnotations, where: str) -> list[Finding]:
    """Images that no usable box belongs to."""
    number = np.bincount(raw.owners[raw.usable()], minlength=len(raw))
    empty = [raw.file_names[i] for i in np.flatnonzero(number == 0)]
    share = len(empty) / max(1, len(raw))
    if len(empty) == len(raw):
        severity: Severity = "error" if where == "train" else "warning"
        return finding(
            severity, "no-boxes", where, "images, none with a box", empty, "annotate some"
        )
    return finding(
        "warning" if share > 0.5 else "note", "empty", where, f"images without boxes ({share:.1%})", empty,
        "they teach what is background; take them out if they are only not annotated yet",
    )  # fmt: skip


def _leaves(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or not path.parts


def _rows(
    raw: RawAnnotations, rows: NDArray[np.bool_] | NDArray[np.int64], severity: Severity, kind: str,
    where: str, what: str, remedy: str,
) -> list[Finding]:  # fmt: skip
    """A finding about boxes, with the file and id of the first."""
    chosen = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
    return finding(
        severity, kind, where, what, len(chosen), remedy,
        [describe_box(raw, int(row)) for row in chosen[:EXAMPLES]],
    )  # fmt: skip


def describe_box(raw: RawAnnotations, row: int) -> str:
    """a.jpg, box 17: 1, 2, 3.5, 4"""
    owner = int(raw.owners[row])
    of = f"{raw.file_names[owner]}, " if owner >= 0 else ""
    values = ", ".join(f"{round(value, 2):g}" for value in raw.xywh[row])
    return f"{of}box {raw.annotation_ids[row]}: {values}"
