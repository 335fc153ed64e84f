"""What an evaluation shows and writes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from model.data.dataset import Reader
from model.data.index import CocoIndex
from model.training.bootstrap import FEWEST_IMAGES, LEVEL, Comparison, Difference
from model.training.evaluation import METRICS, Evaluation
from orchestrator.config.evaluate_cli import EvaluateRequest
from orchestrator.launch.evaluated_model import EvaluatedModel
from orchestrator.launch.progress import PLAIN_INTERVAL_S, duration, print_table
from orchestrator.records.exhibits import CLASS_PREFIX, FIXED, Exhibits

PREFIX = "val/"
FIGURES = "figures"
DPI = 110
SHOWN_CLASSES = 10  # whose difference is largest


class Pace:
    """A line now and then: how many images, how fast, how long yet."""

    def __init__(self, total: int, name: str, out: TextIO) -> None:
        self.total, self.name, self.done = total, name, 0
        self.console = Console(file=out, highlight=False, soft_wrap=True)
        self.began = self.shown = time.monotonic()

    def add(self, images: int) -> None:
        self.done += images
        now = time.monotonic()
        if now - self.shown >= PLAIN_INTERVAL_S or self.done == self.total:
            self.shown = now
            self.say(self.line(now))

    def line(self, now: float) -> str:
        per_s = self.done / max(now - self.began, 1e-9)
        text = f"{self.name}: {self.done}/{self.total} images  {per_s:.1f} img/s"
        left = self.total - self.done
        return f"{text}  ETA {duration(left / per_s)}" if left else text

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self.done < self.total:
            self.say(self.line(time.monotonic()))


@dataclass(frozen=True)
class Report:
    """An evaluation, or two and their comparison. damaged: unreadable images, scored as empty."""

    request: EvaluateRequest
    models: Sequence[EvaluatedModel]
    index: CocoIndex
    split: str
    evaluations: Sequence[Evaluation]
    compared: Comparison | None
    damaged: int
    img_per_s: float
    output: Path

    def show(self, out: TextIO) -> None:
        for model, evaluation in zip(self.models, self.evaluations, strict=True):
            self._scores(model, evaluation, out)
        if self.compared is not None:
            self._comparison(self.compared, out)

    def _scores(self, model: EvaluatedModel, evaluation: Evaluation, out: TextIO) -> None:
        rows = [("model", model.name)]
        rows += [(name, f"{value:.4f}") for name, value in family(evaluation).items()]
        if self.damaged:
            rows.append(("damaged images", f"{self.damaged} could not be read and count as empty"))
        rows.append(("speed", f"{self.img_per_s:.1f} images/s"))
        print_table("scores", rows, out)
        if self.compared is None:
            self._classes(evaluation, out)

    def _classes(self, evaluation: Evaluation, out: TextIO) -> None:
        boxes = np.bincount(
            self.index.labels[~self.index.crowd], minlength=self.index.classes.num_classes
        )
        table = Table(title="by class", title_justify="left", pad_edge=False)
        for name in ("class", "boxes", "AP", "AP50", "AP75"):
            table.add_column(name, justify="left" if name == "class" else "right")
        for label, (name, ap) in enumerate(by_class(self.index, evaluation).items()):
            at = [
                f"{evaluation.precision[t, :, label].mean():.3f}" if ap is not None else ""
                for t in (0, 5)
            ]
            table.add_row(name, str(boxes[label]), "" if ap is None else f"{ap:.3f}", *at)
        _console(out).print(table)

    def _comparison(self, compared: Comparison, out: TextIO) -> None:
        title = f"A against B, {compared.resamples} resamples of the images"
        _console(out).print(_comparison_table(title, compared.metrics))
        largest = sorted(compared.classes.items(), key=lambda item: -abs(item[1].value))
        if len(largest) > 1:
            told = dict(largest[:SHOWN_CLASSES])
            title = f"AP of {len(told)} of {len(largest)} classes, largest difference first"
            _console(out).print(_comparison_table(title, told))
        rows = [
            ("A", self.models[0].name), ("B", self.models[1].name),
            ("result", verdict(compared.metrics["AP"])),
        ]  # fmt: skip
        print_table("verdict", rows, out)

    def as_json(self) -> dict[str, Any]:
        first, *others = [
            {
                "model": model.name,
                "step": model.step,
                "metrics": family(evaluation),
                "classes": by_class(self.index, evaluation),
                "detections": len(evaluation.rows),
                "evaluation": asdict(model.evaluation),
            }
            for model, evaluation in zip(self.models, self.evaluations, strict=True)
        ]
        told: dict[str, Any] = {"status": "finished"} | first
        told |= {
            "data": {
                "annotations": self.index.name, "split": self.split, "images": len(self.index),
                "digest": self.index.digest(), "damaged": self.damaged,
            },
            "scales": list(self.request.scales), "flip": self.request.flip,
            "img_per_s": round(self.img_per_s, 2), "output": str(self.output),
        }  # fmt: skip
        if self.compared is not None:
            told["against"] = others[0]
            told["comparison"] = self._compared_json(self.compared)
        return told

    def _compared_json(self, compared: Comparison) -> dict[str, Any]:
        def rows(found: dict[str, Difference]) -> dict[str, Any]:
            return {
                name: {"difference": one.value, "low": one.low, "high": one.high, "better": one.better, "images": one.images}
                for name, one in found.items()
            }  # fmt: skip

        return {
            "verdict": verdict(compared.metrics["AP"]), "level": LEVEL,
            "resamples": compared.resamples, "seed": compared.seed,
            "metrics": rows(compared.metrics), "classes": rows(compared.classes),
        }  # fmt: skip


def family(evaluation: Evaluation) -> dict[str, float]:
    """AP, AP50, … AR1, …; without those that have no ground truth."""
    found = {name: evaluation.metrics.get(PREFIX + name) for name in METRICS}
    return {name: value for name, value in found.items() if value is not None}


def by_class(index: CocoIndex, evaluation: Evaluation) -> dict[str, float | None]:
    """AP of each class in the order of labels, None without ground truth."""
    return {name: evaluation.metrics.get(CLASS_PREFIX + name) for name in index.classes.names}


def verdict(one: Difference) -> str:
    interval = f"[{one.low:+.4f}, {one.high:+.4f}]"
    if one.images < FEWEST_IMAGES:
        return f"too few images to tell: AP {one.value:+.4f} on {one.images} image(s) with boxes"
    if one.better is None:
        return f"A and B do not differ at {LEVEL:.0%}: AP {one.value:+.4f} {interval}"
    better, gain = (one.better.upper(), abs(one.value))
    low, high = sorted((abs(one.low), abs(one.high)))
    return f"{better} is better by {gain:.4f} AP [{low:.4f}, {high:.4f}]"


def _comparison_table(title: str, found: dict[str, Difference]) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for name in ("", "images", "A", "B", "A - B", f"{LEVEL:.0%} interval", "better"):
        table.add_column(name, justify="left" if name in ("", "better") else "right")
    for name, one in found.items():
        table.add_row(
            name, str(one.images), f"{one.a:.4f}", f"{one.b:.4f}", f"{one.value:+.4f}",
            f"{one.low:+.4f} to {one.high:+.4f}", (one.better or "").upper(),
        )  # fmt: skip
    return table


def _console(out: TextIO) -> Console:
    console = Console(file=out, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    return console


def coco_results(index: CocoIndex, rows: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Detections as COCO's results, with the image and category ids of the dataset."""
    categories = index.classes.category_ids
    return [
        {
            "image_id": int(index.image_ids[int(row[0])]),
            "category_id": categories[int(row[6])],
            "bbox": row[1:5].tolist(),
            "score": float(row[5]),
        }
        for row in rows
    ]


def write_all(report: Report, read: Reader, anchor_overlaps: NDArray[np.float32]) -> None:
    """detections.json (and those of the other model), figures/, and metrics.json last.

    Of what an evaluation before left there nothing stays beside them.
    """
    names = ("detections.json", "detections_against.json")
    for name in ("metrics.json", *names):
        (report.output / name).unlink(missing_ok=True)
    for figure in (report.output / FIGURES).glob("*.png"):
        figure.unlink()
    for name, evaluation in zip(names, report.evaluations, strict=False):
        _write_json(report.output / name, coco_results(report.index, evaluation.rows))
    if report.request.figures:
        _write_figures(report, read, anchor_overlaps)
    _write_json(report.output / "metrics.json", report.as_json(), indent=1)


def _write_figures(report: Report, read: Reader, anchor_overlaps: NDArray[np.float32]) -> None:
    from model.training.analysis import fixed_images

    folder = report.output / FIGURES
    folder.mkdir(exist_ok=True)
    exhibits = Exhibits.of(report.index, read, report.evaluations[0], report.models[0].step)
    for name, figure in exhibits.figures(anchor_overlaps, "boxes of these images"):
        figure.savefig(folder / f"{name}.png", dpi=DPI)
    fixed = [int(image) for image in fixed_images(report.index, FIXED)]
    for name, pixels in exhibits.sheets(fixed, "images of the whole set"):
        Image.fromarray(pixels).save(
            folder / f"{name.replace('validation', 'images').replace(' ', '_')}.png"
        )


def _write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """The file gets its name when it is whole."""
    draft = path.with_suffix(".partial")
    draft.write_text(json.dumps(content, indent=indent) + "\n")
    os.replace(draft, path)
