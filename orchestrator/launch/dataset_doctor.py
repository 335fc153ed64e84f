"""Everything that can be known about a dataset before it is trained on: mistakes, balance, cost."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray

from model.data.annotations import RawAnnotations, read_raw
from model.data.box_lint import lint_boxes, lint_empty, lint_ids
from model.data.findings import Finding, finding, has_errors, worst_first
from model.data.image_lint import Looks, lint_files, list_files, look_at, with_same_sizes
from model.data.lint import SAMPLE
from model.data.split_lint import (
    ClassCount,
    count_classes,
    lint_classes,
    lint_duplicates,
    lint_splits,
)
from model.detection.coverage import Trial, try_anchors
from model.network.scaling import NetworkSpec, resolve
from model.training.benchmark import Ceilings
from model.training.runtime import local_device
from orchestrator.config.doctor_cli import CheckUp
from orchestrator.errors import DataError, nearest
from orchestrator.launch.preflight import choose_hardware
from orchestrator.launch.resolve import (
    Split,
    as_published,
    find_splits,
    output_folder,
    read_annotations,
)
from orchestrator.launch.size_estimate import SizeEstimate, estimate_sizes
from orchestrator.storage.filesystems import is_remote

GOOD_COVER, BETTER = 0.95, 0.02
ANCHOR_BOXES = 50_000  # spread evenly: the shares are then good to half a percent
SAY_EVERY_S = 5.0


@dataclass(frozen=True)
class SplitFacts:
    """One split in numbers. looked_at: images decoded."""

    name: str
    annotations: str
    images_folder: str
    images: int
    boxes: int
    crowds: int
    classes: int
    looked_at: int


@dataclass(frozen=True)
class DataReport:
    """What was found; anchors, sizes: empty where the annotations cannot be read."""

    findings: Sequence[Finding]
    splits: Sequence[SplitFacts]
    network: str
    classes: Sequence[ClassCount] = ()
    anchors: Sequence[Trial] = ()
    sizes: Sequence[SizeEstimate] = ()
    rates: Ceilings | None = None
    notes: tuple[str, ...] = ()

    def sorted(self) -> DataReport:
        return replace(self, findings=worst_first(self.findings))

    @property
    def well(self) -> bool:
        return not has_errors(self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "findings": [one.to_json() for one in self.findings],
            "splits": [asdict(one) for one in self.splits],
            "classes": [asdict(one) for one in self.classes],
            "network": self.network,
            "anchors": [asdict(one) for one in self.anchors],
            "sizes": [asdict(one) for one in self.sizes],
            "rates": None if self.rates is None else asdict(self.rates),
            "notes": list(self.notes),
        }


def examine_data(check: CheckUp, out: TextIO | None = None) -> DataReport:
    """Look at the data of a job, and at what its network would make of them.

    Raises:
        UserError: data that are not where they were said to be, a network that cannot be.
    """
    job = as_published(check.job)
    resolve(job.model, 1)  # a size that cannot be is said before anything is read
    train_split, val_split, notes = find_splits(job, output_folder(job)[0])
    alone = val_split == train_split
    findings = finding(
        "warning", "no-val", "val", "no *val*.json: training would be scored on the TRAINING images",
        int(alone), "split the images in two files",
    )  # fmt: skip
    train, found = _read(train_split, "train", job.data.classes)
    val, more = (None, []) if alone else _read(val_split, "val", job.data.classes)
    spec = resolve(job.model, max(1, len(train.category_ids) if train is not None else 1))
    findings += found + more + _lint(train, val, spec, check)
    looks, found = _look(train, val, train_split, val_split, check, out or sys.stdout)
    findings += found
    splits = [
        _facts(raw, split, name, looks)
        for raw, split, name in ((train, train_split, "train"), (val, val_split, "val"))
        if raw is not None
    ]
    told = () if alone else tuple(notes)  # of one split alone there is a finding
    report = DataReport(findings, splits, f"phi {spec.phi}, {spec.image_size_px} px", notes=told)
    if train is None:
        return report.sorted()
    trials, found = _anchors(train, spec)
    findings += found
    hardware = choose_hardware(
        job, cpus=len(os.sched_getaffinity(0)), gpus=torch.cuda.device_count(), local=True
    )
    device = torch.device("cpu") if hardware.device_kind == "CPU" else local_device(0)
    sizes, rates = estimate_sizes(job.model, spec.num_classes, hardware, device)
    return replace(
        report, classes=tuple(count_classes(train, val)), anchors=tuple(trials), sizes=tuple(sizes),
        rates=rates,
    ).sorted()  # fmt: skip


def _lint(
    train: RawAnnotations | None, val: RawAnnotations | None, spec: NetworkSpec, check: CheckUp
) -> list[Finding]:
    """What the annotations alone show."""
    findings: list[Finding] = []
    for raw, where in ((train, "train"), (val, "val")):
        if raw is not None:
            findings += lint_ids(raw, where) + lint_empty(raw, where)
            findings += lint_boxes(
                raw, where, image_size_px=spec.image_size_px, tiny_px=check.tiny_px
            )
    if train is not None:
        findings += lint_classes(count_classes(train, val), with_val=val is not None)
    if train is not None and val is not None:
        findings += lint_splits(train, val)
    return findings


def _read(
    split: Split, where: str, classes: tuple[str, ...] | None
) -> tuple[RawAnnotations | None, list[Finding]]:
    try:
        text = read_annotations(split.annotations, split.cache)
    except OSError as error:
        raise DataError(
            f"data.{where}.annotations", "a file that can be read",
            f"{split.annotations} ({error.strerror or error})", "correct it",
        ) from None  # fmt: skip
    raw, findings = read_raw(text, where, split.annotations.name)
    if raw is None:
        return None, findings
    for name in classes or ():
        if name not in raw.category_names:
            raise DataError(
                "data.classes", f"a class of {raw.name}", repr(name), nearest(name, raw.category_names)
            )  # fmt: skip
    raw = raw if classes is None else raw.only(classes)
    return raw if split.first is None else raw.first(split.first), findings


def _look(
    train: RawAnnotations | None, val: RawAnnotations | None, train_split: Split, val_split: Split,
    check: CheckUp, out: TextIO,
) -> tuple[dict[str, Looks], list[Finding]]:  # fmt: skip
    """Files of both splits: there, readable, and none in both."""
    same_files = train_split.images == val_split.images
    looks: dict[str, Looks] = {}
    findings: list[Finding] = []
    for raw, other, split, where in (
        (train, val, train_split, "train"), (val, train, val_split, "val"),
    ):  # fmt: skip
        if raw is None:
            continue
        others = other.file_names if other is not None and same_files else []
        present = list_files(split.images, raw.file_names)
        # A subset was asked for: what is left out of it is no oversight.
        listed = present if split.first is None else raw.file_names
        findings += lint_files(raw, sorted(set(present) & set(listed)), others, where)
        most = None if check.every_image else SAMPLE
        say = _Saying(f"{where}: image", len(raw) if most is None else min(most, len(raw)), out)
        looks[where], found = look_at(raw, split.reader(), where, most=most, progress=say)
        findings += found
    if "train" not in looks:
        return looks, findings
    if "val" in looks and not check.every_image and not is_remote(train_split.images):
        sizes = {}
        for name in looks["train"].names:
            path = train_split.images / name
            if path.is_file():
                sizes[name] = path.stat().st_size
        say = _Saying("train: same as in val, image", len(sizes), out)
        looks["train"] = with_same_sizes(
            looks["train"], looks["val"], sizes, train_split.reader(), say
        )
    findings += lint_duplicates(looks["train"], looks.get("val"), same_files=same_files)
    return looks, findings


class _Saying:
    """A line now and then; nothing for what takes no time."""

    def __init__(self, what: str, total: int, out: TextIO) -> None:
        self.what, self.total, self.out = what, total, out
        self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        if time.monotonic() - self._said > SAY_EVERY_S:
            self._said = time.monotonic()
            print(f"{self.what} {done} of {self.total}", file=self.out, flush=True)


def _facts(raw: RawAnnotations, split: Split, name: str, looks: dict[str, Looks]) -> SplitFacts:
    crowds = int(raw.crowd.sum())
    return SplitFacts(
        name, _shown(split.annotations), _shown(split.images), len(raw), len(raw.crowd) - crowds, crowds,
        len(raw.category_ids), looks[name].looked_at,
    )  # fmt: skip


def _shown(path: Path) -> str:
    return str(path) if is_remote(path) else os.path.normpath(path)


def unit_boxes(raw: RawAnnotations) -> NDArray[np.float64]:
    """Boxes of training [M, 4] in sides of the network's input, as it sees them unaugmented."""
    rows = raw.usable() & ~raw.crowd
    sizes = np.full(len(rows), np.nan)
    sizes[rows] = raw.sizes_hw[raw.owners[rows]].max(axis=1)
    boxes = raw.corners()
    rows &= (sizes > 0) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    unit: NDArray[np.float64] = boxes[rows] / sizes[rows, None]
    return unit


def _anchors(raw: RawAnnotations, spec: NetworkSpec) -> tuple[list[Trial], list[Finding]]:
    boxes = unit_boxes(raw)
    total = len(boxes)
    if not total:
        return [], []
    if total > ANCHOR_BOXES:
        boxes = boxes[np.linspace(0, total - 1, ANCHOR_BOXES).astype(np.int64)]
    trials = try_anchors(boxes, spec)
    now = trials[0].share
    if now >= GOOD_COVER:
        return trials, []
    remedies: list[str] = []
    for most_work in (1.0, math.inf):
        possible = [one for one in trials if one.setting and one.cost <= most_work]
        best = max(possible, key=lambda one: (round(one.share, 3), -one.cost))
        work = f"{best.cost:.3g} times the work" if best.cost > 1 else "no more work"
        text = f"{best.setting} covers {best.share:.0%} for {work}"
        if best.share >= now + BETTER and text not in remedies:
            remedies.append(text)
    remedy = (
        "; ".join(remedies) or "their sizes and shapes differ too much; see the table of anchors"
    )
    left = round((1 - now) * total)
    return trials, finding(
        "warning" if now < 0.8 else "note", "uncovered", "train",
        f"boxes that no anchor covers by half ({1 - now:.1%}): each still gets its best anchor, "
        "but learns from it alone", left, remedy,
    )  # fmt: skip
