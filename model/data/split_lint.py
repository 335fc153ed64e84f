"""Mistakes between training and validation data, and how the classes are spread over both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.data.annotations import RawAnnotations
from model.data.findings import Finding, finding
from model.data.image_lint import Looks

TRAIN, VAL, BOTH = "train", "val", "train, val"
RARE_BOXES = 20
SKEW = 100.0
NEAR_BITS = 4  # of 128
FLAT_BITS = 12  # a picture with fewer bits set, or unset, has too little in it to be told apart
PAIRS_AT_ONCE = 2**21
LEAK_REMEDY = "take them out of one: validation scores of them mean nothing"


@dataclass(frozen=True)
class ClassCount:
    """Boxes of a class, and images that have one; crowds are not counted."""

    name: str
    train_boxes: int
    train_images: int
    val_boxes: int
    val_images: int


def count_classes(train: RawAnnotations, val: RawAnnotations | None) -> list[ClassCount]:
    """Classes of both files by name, most boxes first."""
    here, there = _by_name(train), {} if val is None else _by_name(val)
    none = (0, 0)
    counts = [
        ClassCount(name, *here.get(name, none), *there.get(name, none))
        for name in dict.fromkeys([*here, *there])
    ]
    return sorted(counts, key=lambda one: (-one.train_boxes, -one.val_boxes, one.name))


def _by_name(raw: RawAnnotations) -> dict[str, tuple[int, int]]:
    rows = np.flatnonzero(raw.usable() & ~raw.crowd)
    boxes = np.bincount(raw.labels[rows], minlength=len(raw.category_ids))
    pairs = np.unique(np.stack([raw.labels[rows], raw.owners[rows]], axis=1), axis=0)
    images = np.bincount(pairs[:, 0], minlength=len(raw.category_ids))
    return {
        name: (int(boxes[k]), int(images[k])) for k, name in enumerate(raw.category_names)
    }  # fmt: skip


def lint_classes(counts: Sequence[ClassCount], *, with_val: bool) -> list[Finding]:
    """Classes that cannot be learned, or not be measured, and those that hardly can."""
    untaught = [one.name for one in counts if not one.train_boxes and one.val_boxes]
    unused = [one.name for one in counts if not one.train_boxes and not one.val_boxes]
    unmeasured = [one.name for one in counts if one.train_boxes and not one.val_boxes and with_val]
    rare = [f"{one.name} ({one.train_boxes})" for one in counts if 0 < one.train_boxes < RARE_BOXES]
    taught = [one.train_boxes for one in counts if one.train_boxes]
    skew = max(taught) / min(taught) if taught else 1.0
    return [
        *finding("warning", "untaught-class", BOTH, "classes in val that have no box in train",
                 untaught, "split the images anew, so that each class is in both"),
        *finding("warning", "unused-class", BOTH, "classes without any box", unused,
                 "take them out of categories: they only cost a part of the head"),
        *finding("warning", "unmeasured-class", BOTH, "classes in train that have no box in val",
                 unmeasured, "their AP is missing; move some images to val"),
        *finding("warning", "rare-class", TRAIN, f"classes with fewer than {RARE_BOXES} boxes",
                 rare[::-1], "annotate more of them, or merge them with others"),
        *finding("note", "skew", TRAIN, "times as many boxes of the commonest class "
                 "as of the rarest", round(skew) if skew >= SKEW else 0,
                 "look at AP by class (val_class/), not only at their mean"),
    ]  # fmt: skip


def lint_splits(train: RawAnnotations, val: RawAnnotations) -> list[Finding]:
    """What the two annotation files have in common, and should not, or have not, and should."""
    findings: list[Finding] = []
    if (train.category_ids, train.category_names) != (val.category_ids, val.category_names):
        ours = dict(zip(train.category_ids, train.category_names, strict=True))
        theirs = dict(zip(val.category_ids, val.category_names, strict=True))
        differing = sorted(i for i in ours.keys() | theirs if ours.get(i) != theirs.get(i))
        shown = [f"{i}: {ours.get(i, 'none')} / {theirs.get(i, 'none')}" for i in differing]
        findings += finding(
            "error", "other-categories", BOTH, "category ids that mean something else in val", shown,
            "export both splits from the same list of categories",
        )  # fmt: skip
    return findings


def lint_duplicates(train: Looks, val: Looks | None, *, same_files: bool) -> list[Finding]:
    """Pictures that stand twice. same_files: both splits name files of one folder.

    Contents are compared by digest, and by a hash of what is seen, as far as they were looked at.
    """
    findings = []
    for looks, where in ((train, TRAIN), (val, VAL)):
        if looks is not None:
            findings += _within(looks, where)
    if val is None:
        return findings
    common = sorted(set(train.names) & set(val.names))
    if same_files:
        findings += finding(
            "error", "leak-name", BOTH, "files that are in train and in val", common, LEAK_REMEDY
        )
    known = {digest: name for name, digest in train.digests.items()}
    leaked = [
        f"{name} = {known[digest]}"
        for name, digest in val.digests.items()
        if digest in known and not (same_files and name == known[digest])
    ]
    findings += finding(
        "error", "leak-content", BOTH, "pictures of val that are in train, byte for byte", leaked,
        LEAK_REMEDY,
    )  # fmt: skip
    exact = {name for name, value in val.digests.items() if value in known}
    near = [
        f"{val.hashed[b]} ~ {train.hashed[a]}"
        for a, b in near_pairs(train.hashes, val.hashes)
        if val.hashed[b] not in exact
    ]
    findings += finding(
        "warning", "leak-near", BOTH, "pictures of val that look like one of train (saved anew, or "
        "another frame)", near, "look at them; split by scene or video, not by image",
    )  # fmt: skip
    return findings


def _within(looks: Looks, where: str) -> list[Finding]:
    first: dict[bytes, str] = {}
    repeated = [
        f"{name} = {first[digest]}"
        for name, digest in looks.digests.items()
        if first.setdefault(digest, name) != name
    ]
    return finding(
        "warning", "repeated-content", where, "files that repeat another one", repeated,
        "keep one, with the boxes of both",
    )  # fmt: skip


def near_pairs(
    ours: NDArray[np.uint64], theirs: NDArray[np.uint64], bits: int = NEAR_BITS
) -> list[tuple[int, int]]:
    """(i, j) of hashes [n, 2] and [m, 2] that differ in at most `bits`; the nearest i of each j."""
    if not len(ours) or not len(theirs):
        return []
    clear_ours, clear_theirs = np.flatnonzero(_clear(ours)), np.flatnonzero(_clear(theirs))
    if not len(clear_ours):
        return []
    found = []
    turn = max(1, PAIRS_AT_ONCE // len(clear_ours))
    for start in range(0, len(clear_theirs), turn):
        part = clear_theirs[start : start + turn]
        differing = np.bitwise_count(theirs[part, None] ^ ours[clear_ours]).sum(axis=2)
        nearest = differing.argmin(axis=1)
        close = differing[np.arange(len(part)), nearest] <= bits
        found += [(int(clear_ours[nearest[k]]), int(part[k])) for k in np.flatnonzero(close)]
    return found


def _clear(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    number = np.bitwise_count(hashes).sum(axis=1).astype(np.int64)
    clear: NDArray[np.bool_] = (number >= FLAT_BITS) & (number <= 128 - FLAT_BITS)
    return clear
